"""Fewer routed experts: those stay that a score says matter, as many in every layer, since a config has one number for all."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from llmsparse.calibration.least_squares import JUDGES
from llmsparse.calibration.matching import HELD_OUT_SHARE
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.models.new_config import text_part
from llmsparse.models.prunable import refuse_stored
from llmsparse.models.streamed import Activations, Block
from llmsparse.ranks.group import ALONE, Ranks
from llmsparse.ranks.share import Share
from llmsparse.runs.seeding import generator_for
from llmsparse.scoring.file import ScoresFile
from llmsparse.scoring.mixture import Mixture
from llmsparse.scoring.plan import find_mixtures
from llmsparse.scoring.scores import Chosen, choose
from llmsparse.scoring.statistics import ExpertStatistics, blend
from llmsparse.scoring.watcher import SumsOfTexts, Watcher
from llmsparse.shrinking.expert_count import ACTIVE, GROUPS, GROUPS_ACTIVE, number, with_experts
from llmsparse.shrinking.expert_keys import Op, Ops, beside, cut_specs, cut_tensors, expert_keys, expert_sizes
from llmsparse.shrinking.expert_refit import one_in, refit_experts
from llmsparse.shrinking.recipe import ShrinkRecipe, amount_of, refuse_amount
from llmsparse.shrinking.reduction import Cut, Reduction, Rows, Source, Specs, Sum

if TYPE_CHECKING:
    from llmsparse.runs.run import Run
    from llmsparse.shrinking.plan import ShrinkPlan


def plan(recipe: ShrinkRecipe, source: Source) -> Reduction:
    """RecipeError for a number of experts that cannot be, CheckpointError for a model that has none to take out."""
    model, config = source.model, source.model.config.get_text_config(decoder=True)
    instead = "--experts takes nothing out: make it a mixture with `llmsparse factorize`, or give --ffn 75%"
    mixtures = find_mixtures(model, source.where, instead)
    counts = sorted({mixture.experts for mixture in mixtures.values()})
    if len(counts) > 1:
        raise CheckpointError(
            f"{source.where}: layers have {counts[0]} to {counts[-1]} experts, which no one number would say of the result"
        )
    assert recipe.experts is not None
    experts, groups = counts[0], max(1, number(config, GROUPS, 1))
    kept = amount_of(recipe.experts, experts, groups)
    refuse_amount("experts", recipe.experts, kept, experts)
    _refuse_too_few(recipe.experts, kept, config, groups)
    expert_weights = [weight for index in mixtures for weight in model.weights(index) if weight.kind == "expert"]
    refuse_stored(model.folder, ((weight.key, model.dtype_of(weight)) for weight in expert_weights))
    names = [f"{model.block_names[index]}.{name}" for index, mixture in mixtures.items() for name in mixture.parameters]
    fields, shapes = with_experts(source, experts, kept, names)
    ops = {index: expert_keys(model, source.reader, index, shapes, experts) for index in mixtures}
    scores = None if recipe.scores is None else ScoresFile(recipe.scores)
    if scores is not None:
        scores.check_model(model, source.reader, mixtures)
        scores.blend(recipe.blend)
    last = max(mixtures)
    more = beside(model, ops[last], model.block_keys(last))
    inner = max(
        weight.shape[1] for weight in expert_weights if weight.slot[0] in {one.down for one in mixtures.values()}
    )
    active = number(config, ACTIVE, 1)
    return Experts(recipe, mixtures, experts, kept, active, groups, model.config, fields, ops, more, inner, scores)


def _refuse_too_few(asked: str, kept: int, config: Any, groups: int) -> None:
    """RecipeError where a token could not be sent to as many experts as it is."""
    active = number(config, ACTIVE, 1)
    if kept < active:
        raise RecipeError(
            f"--experts {asked}: {kept} stay, but each token is sent to {active}; ask for {active} or more"
        )
    if groups == 1:
        return
    if kept % groups:
        raise RecipeError(
            f"--experts {asked}: its router chooses among {groups} groups of experts, which lose equally many; "
            f"ask for a multiple of {groups}"
        )
    chosen = number(config, GROUPS_ACTIVE, groups)
    least = groups * max(2, -(-active // chosen))  # two of a group are what a group is chosen by
    if kept < least:
        raise RecipeError(
            f"--experts {asked}: a token is sent to {active} experts of {chosen} of {groups} groups, so {least} have to stay; "
            f"ask for {least} or more"
        )


@dataclass(frozen=True)
class Experts(Reduction):
    """`kept` of `experts` routed experts stay in every layer that has them."""

    name: ClassVar[str] = "experts"

    recipe: ShrinkRecipe
    mixtures: Mapping[int, Mixture]  # block number → its experts
    experts: int
    kept: int
    active: int  # for a token
    groups: int  # of experts in a row, of which each loses as many
    config: Any  # of the source
    fields: Mapping[str, Any]  # of it, with their new values
    ops: Mapping[int, Ops]
    more: Sequence[Ops]  # of blocks beside the model's own
    inner: int  # hidden units of an expert
    scores: ScoresFile | None  # what was measured before
    texts: Sequence[Sequence[str]] = ()  # batch by batch the text of every window
    fitted: Container[int] = ()  # numbers of the batches that what stays is fitted on, and judged
    weights: Mapping[str, float] | None = None  # of the texts, in the blend that decides

    @property
    def watches(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.scores is None or self.recipe.refit

    def survey(self, plan: ShrinkPlan, run: Run[Any]) -> Experts:
        """Which windows are of which text, and fitted on; and that scores measured before are of this very model."""
        batches = len(plan.batches)
        fitted = range(0, batches * self.recipe.refit, self._one_in(plan.windows.ids.numel(), batches))
        surveyed = replace(self, texts=plan.texts_of_batches, fitted=fitted, weights=plan.texts)
        if self.scores is None:
            return surveyed
        self.scores.check_model(plan.model, plan.reader, self.mixtures)
        return replace(surveyed, weights=self.scores.blend(self.recipe.blend))

    def _one_in(self, tokens: int, batches: int) -> int:
        """Of so many batches one is fitted on, but of no fewer than some to hold out one."""
        return min(one_in(tokens, self.inner, self.kept, self.active), max(1, batches // HELD_OUT_SHARE))

    def fingerprint(self) -> dict[str, Any]:
        return {} if self.scores is None else {"scores": self.scores.fingerprint}

    def change(self, raw: dict[str, Any]) -> None:
        text_part(self.config, raw).update(self.fields)

    def resized(self, index: int, specs: Specs) -> Specs:
        return cut_specs(self.ops.get(index, {}), specs, self.kept)

    def touches(self) -> set[str]:
        return {key for ops in self.more for key in ops}

    def resized_outside(self, specs: Specs) -> Specs:
        return cut_specs(self._more, specs, self.kept)

    def cut_outside(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """By the norm of their weights: no text runs through these."""
        for ops in self.more:
            sizes = expert_sizes(ops, tensors, self.experts)
            kept = choose(_of_sizes(sizes), "frequency", self.kept, groups=self.groups).kept
            cut = cut_tensors(ops, {key: tensors[key] for key in ops}, kept)
            tensors = {key: tensor for key, tensor in tensors.items() if key not in ops} | cut
        return tensors

    @property
    def _more(self) -> dict[str, Op]:
        return {key: op for ops in self.more for key, op in ops.items()}

    def memory_bytes(self, share: Share) -> int:
        """Sums of pairs; where what is left is fitted to what all experts gave, what entered them and what is missing of
        their output, the hidden units of one of them, its equations and the tokens that judge it."""
        width = self.config.get_text_config(decoder=True).hidden_size
        one_in = self._one_in(share.tokens, share.total)
        tokens, judges = -(-share.most_tokens // one_in), min(JUDGES, -(-share.tokens // one_in))
        equations = max(3, 1 + share.sums_at_once) * self.inner**2 + (3 + share.sums_at_once) * self.inner * width
        fitting = 2 * tokens * width + equations + judges * (self.inner + width) + tokens * self.inner
        return 4 * fitting * self.recipe.refit + (2 + share.sums_at_once) * 8 * self.experts**2

    def begin(self, block: Block) -> Cut:
        if block.index not in self.mixtures:
            return Cut()
        return ExpertCut(self, block, self.mixtures[block.index], self.ops[block.index])

    def describe(self) -> str:
        return (
            f"{self.kept} of {self.experts} routed experts stay in each of {len(self.mixtures)} layers, "
            f"chosen by {self.recipe.expert_score}"
        )

    def findings(self, rows: Rows) -> list[tuple[str, str]]:
        lines = [("experts", self.describe())]
        lost = [row["lost"] for _, row in rows if row["lost"] is not None]
        if lost:
            lines.append(("lost", f"{sum(lost) / len(lost):.3f} of what experts add, mean of {len(lost)} layers"))
        fits = [row["refit"] for _, row in rows if row.get("refit")]
        kept = [fit for fit in fits if fit["kept"]]
        if fits:
            mean = (
                {key: sum(fit[key] for fit in kept) / len(kept) for key in ("error_before", "error_after")}
                if kept
                else {}
            )
            spelled = f", mean error {mean['error_before']:.4f} → {mean['error_after']:.4f}" if kept else ""
            lines.append(("refit", f"helps in {len(kept)} of {len(fits)} layers{spelled}"))
        supers = [f"{name}: {', '.join(map(str, row['super']))}" for name, row in rows if row["super"]]
        if supers:
            lines.append(("super experts", f"{'; '.join(supers)}; kept, their outputs are by far the largest"))
        return lines

    def warnings(self, rows: Rows) -> list[str]:
        idle = [(name, row["unreached"]) for name, row in rows if row["unreached"]]
        if not idle:
            return []
        count, (name, first) = sum(len(experts) for _, experts in idle), idle[0]
        return [
            f"{count} experts were reached by no token, expert {first[0]} of {name} first; they go before the others: use more "
            "--calibration-samples, or text of what the model is for"
        ]


def _of_sizes(sizes: Tensor) -> ExpertStatistics:
    """Sizes in the place of how often experts were chosen."""
    statistics = ExpertStatistics.empty(len(sizes))
    statistics.tokens = sizes + 1.0
    return statistics


class ExpertCut(Cut):
    """Experts of one block."""

    def __init__(self, plan: Experts, block: Block, mixture: Mixture, ops: Ops) -> None:
        self._plan, self._name, self._mixture, self._ops = plan, block.name, mixture, ops
        self._watcher = Watcher(block, mixture, plan.texts, plan.fitted)
        self.watches = plan.watches
        self._summed: SumsOfTexts | None = None
        self._ranks = ALONE
        self._chosen: Chosen | None = None
        self._refit: dict[str, Any] = {}

    def learn(self, acts: Activations, aims: Activations | None) -> None:
        self._ranks = acts.share.ranks

    def owners(self, ranks: Ranks) -> list[int]:
        return [0] * self.watches

    def begin_sums(self, leaf: int) -> Sequence[Sum]:
        return [self._watcher.begin_sums()] * self.watches

    def watching(self, batch: int) -> AbstractContextManager[None]:
        return self._watcher.watching(batch) if self.watches else nullcontext()

    def take_sums(self, totals: Sequence[Any]) -> None:
        self._summed = next(iter(totals), None)

    def cut(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self._chosen = self._ranks.known(lambda: self._choose(tensors))
        return cut_tensors(self._ops, tensors, self._chosen.kept)

    def _choose(self, tensors: dict[str, Tensor]) -> Chosen:
        plan, measured = self._plan, self._summed.cpu() if self._summed else {}
        statistics = blend(measured if plan.scores is None else plan.scores.statistics(self._name), plan.weights)
        sizes = expert_sizes(self._ops, tensors, plan.experts) if bool((statistics.tokens == 0).any()) else None
        generator = generator_for(self._name, plan.recipe.seed)
        return choose(
            statistics, plan.recipe.expert_score, plan.kept, groups=plan.groups, sizes=sizes, generator=generator
        )

    def refit(self, made: Block, acts: Activations) -> None:
        mixture = Mixture(self._mixture.path, self._plan.kept, self._mixture.parameters, self._mixture.weighs_inputs)
        self._refit = refit_experts(made, acts, mixture, self._watcher.outputs)

    def row(self) -> dict[str, Any]:
        chosen = self._chosen
        assert chosen is not None
        named = {"kept": chosen.kept, "unreached": chosen.unreached, "super": chosen.super_experts, "lost": chosen.lost}
        return named | ({"refit": self._refit} if self._refit else {})
