"""What shrinking a model will do, decided and checked before a weight is read."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import gc
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from llmsparse.calibration.matching import HELD_OUT_SHARE, batches_per_step
from llmsparse.encodings.reader import without_encoding
from llmsparse.models.new_config import NewConfig
from llmsparse.models.origin import read_config
from llmsparse.models.prunable import refuse_flat_experts, refuse_shared_blocks
from llmsparse.runs.device import split_batches
from llmsparse.runs.joint import joint
from llmsparse.runs.memory import freed_bytes
from llmsparse.runs.opening import fetched, open_model, read_windows
from llmsparse.runs.partial import held_bytes
from llmsparse.runs.plan import RunPlan
from llmsparse.shrinking.block import ShrinkOptions
from llmsparse.shrinking.folding import last_matrix
from llmsparse.shrinking.logit_fit import fit_bytes
from llmsparse.shrinking.recipe import ShrinkRecipe
from llmsparse.shrinking.reduction import Reduction, Source, Specs
from llmsparse.shrinking.reductions import plan_reductions
from llmsparse.shrinking.verified import check_made
from llmsparse.storage.disk import check_room, parse_size

if TYPE_CHECKING:
    from llmsparse.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class ShrinkPlan(RunPlan[ShrinkRecipe]):
    """A smaller model that has passed every check that needs no weights; `model` is the whole one."""

    reductions: list[Reduction]
    raw: dict[str, Any]  # config.json of the source; `config` is that of what is made

    def with_config(self) -> Self:
        """With the config.json that the reductions make of the source's."""
        raw = deepcopy(self.raw)
        for reduction in self.reductions:
            reduction.change(raw)
        return replace(self, config=NewConfig(raw))

    @property
    def fits(self) -> bool:
        """Something is fitted to what the whole block did."""
        return self.recipe.refit or self.recipe.match_steps > 0

    @property
    def watches(self) -> bool:
        """Calibration text is run through the whole blocks."""
        return bool(self.recipe.match_steps) or any(reduction.watches for reduction in self.reductions)

    @property
    def aims(self) -> bool:
        """What is fitted is fitted to what the source's own blocks make, not to what its block makes behind made ones; the
        same where blocks go, which are made up for by themselves, and in one pass."""
        kinds = [reduction.name for reduction in self.reductions]
        wanted = any(reduction.aims for reduction in self.reductions)
        return self.fits and wanted and "blocks" not in kinds and not self.recipe.one_pass

    @cached_property
    def batches(self) -> list[Tensor]:
        """As many at least as a fit needs to hold some out."""
        size, width = self.recipe.batch_size, self.model.hidden_size
        routed = any(reduction.name == "experts" for reduction in self.reductions)
        return split_batches(self.windows.ids, size, self.device, width, least=HELD_OUT_SHARE, routed=routed)

    @property
    def options(self) -> ShrinkOptions:
        """What the work on a block is told."""
        recipe = self.recipe
        return ShrinkOptions(self.reductions, recipe.refit, recipe.match_steps, recipe.seed, self.device, self.dtype)

    def target(self, index: int) -> int | None:
        """The block of the made model that block `index` becomes; None where it goes."""
        numbers = [reduction.target(index) for reduction in self.reductions]
        changed = [number for number in numbers if number != index]
        return changed[0] if changed else index

    def block_specs(self, index: int) -> Specs:
        """Of what is written of block `index`; {} where it goes."""
        if self.target(index) is None:
            return {}
        specs = self._stored(self.model.block_keys(index))
        for reduction in self.reductions:
            specs = reduction.resized(index, specs)
        return specs

    @cached_property
    def touched(self) -> set[str]:
        """Keys outside the blocks that some reduction cuts."""
        return {key for reduction in self.reductions for key in reduction.touches()}

    @cached_property
    def copied(self) -> list[str]:
        return [key for key in self.model.outside_keys if key not in self.touched]

    @cached_property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        touched = self._stored([key for key in self.model.outside_keys if key in self.touched])
        for reduction in self.reductions:
            touched = reduction.resized_outside(touched)
        found = self._stored(self.copied) | touched
        for index in range(len(self.model.block_names)):
            found |= self.block_specs(index)
        return found

    def added(self) -> dict[str, Tensor]:
        tensors = self.reader.read(self.touched)
        for reduction in self.reductions:
            tensors = reduction.cut_outside(tensors)
        return tensors

    def _stored(self, keys: list[str]) -> Specs:
        return {key: (spec.shape, spec.dtype) for key in keys for spec in [self.reader.spec(key)]}

    @property
    def fingerprint(self) -> dict[str, Any]:
        found = super().fingerprint
        for reduction in self.reductions:
            found |= reduction.fingerprint()
        return found

    @property
    def total_parameters(self) -> tuple[int, int]:
        """Of the source, and of what is made."""
        before = sum(torch.Size(self.reader.spec(key).shape).numel() for key in self.reader.keys())
        return before, sum(torch.Size(shape).numel() for shape, _ in self.tensors.values())

    def memory_bytes(self) -> int:
        """An estimate of the peak: what is there throughout; the block that is read, and the one that is written, meanwhile;
        a block whole and as it is made, each as it is stored and as it is computed with; what a batch is made into."""
        itemsize, width = self.dtype.itemsize, self.model.hidden_size
        sizes = [self._stored(self.model.block_keys(index)) for index in range(len(self.model.block_names))]
        numbers = max(sum(torch.Size(shape).numel() for shape, _ in specs.values()) for specs in sizes)
        stored = max(sum(torch.Size(s).numel() * d.itemsize for s, d in specs.values()) for specs in sizes)
        stored = stored if self.device.type == "cpu" else 0
        share = self.share
        calibration = share.most_tokens * (self.watches + (self.recipe.one_pass and self.fits) + self.fits + self.aims)
        held_out = self.share_of(self.held_out).most_tokens if self.held_out else 0
        streams = (calibration + 2 * held_out) * width * itemsize
        matching = 0
        if self.recipe.match_steps:  # masters, what Adam remembers, and their gradients in the tree
            together = batches_per_step(*share.shapes[0], width, most=share.total)
            matching = 4 * (3 + self.share_of(self.batches[:together]).sums_at_once) * numbers
        working = 8 * self.batches[0].numel() * width * 4
        head = self.model.vocabulary * width * itemsize
        held = sum(reduction.memory_bytes(share) for reduction in self.reductions)
        blocks = 3 * stored + numbers * itemsize + working
        worked = max(matching + held, self._logit_fit_bytes)
        return self.footprint + freed_bytes(self.device, stored) + streams + max(2 * head, blocks + worked)

    @property
    def _logit_fit_bytes(self) -> int:
        """Of fitting the last matrix of the last block to logits."""
        last = len(self.model.block_names) - 1
        weight = last_matrix(self.model.weights(last), self.model.hidden_size)
        if weight is None or not (self.aims and self.recipe.refit):
            return 0
        shape, _ = self.block_specs(last)[weight.key]
        return fit_bytes(self.model, torch.Size(shape).numel() // self.model.hidden_size, self.share)

    def to_json(self) -> dict[str, Any]:
        before, after = self.total_parameters
        return super().to_json() | {
            "shrinks": {reduction.name: reduction.describe() for reduction in self.reductions},
            "parameters": {"before": before, "after": after},
            "refit": self.recipe.refit,
            "match_steps": self.recipe.match_steps,
        }

    def rows(self, plan: dict[str, Any]) -> dict[str, str]:
        before, after = self.total_parameters
        fit = ["refit"] * self.recipe.refit + [f"matching, {self.recipe.match_steps} steps a block"] * bool(
            self.recipe.match_steps
        )
        return {
            "model": f"{plan['model']}, {plan['blocks']} blocks, {before:,} parameters",
            "output": f"{plan['output']}, {after:,} parameters, {after / before:.1%} of these",
            **plan["shrinks"],
            "fit": ", ".join(fit) or "none",
        }


def surveyed(run: Run[ShrinkPlan]) -> ShrinkPlan:
    """The plan of a run once all is known that the shapes of the result depend on."""
    reductions = [reduction.survey(run.plan, run) for reduction in run.plan.reductions]
    plan = replace(run.plan, reductions=reductions).with_config()
    with run.ranks.together():
        check_made(plan.model.config, plan.config.raw, plan.tensors, plan.folder, plan.trust_remote_code)
    gc.collect()  # models without weights, which shapes were learned from: their modules hold each other
    return plan


@joint
def make_plan(
    recipe: ShrinkRecipe, *, resume: bool = False, overwrite: bool = False, download: bool = True
) -> ShrinkPlan:
    """Resolve and check everything a run needs, from headers and shapes alone, then read the calibration text.

    Last of all weights are downloaded that are not here yet, unless `download` is off: a plan needs none.
    """
    opened = open_model(recipe, resume=resume, overwrite=overwrite)
    refuse_shared_blocks(opened.model)
    refuse_flat_experts(opened.model)
    raw = without_encoding(read_config(opened.origin.folder))
    reductions = plan_reductions(recipe, Source(opened.model, opened.reader, raw, opened.trust_remote_code))
    windows = read_windows(opened, recipe.calibration_samples)
    plan = ShrinkPlan(**opened.fields, windows=windows, reductions=reductions, raw=raw).with_config()
    check_made(opened.config, plan.config.raw, plan.tensors, plan.folder, plan.trust_remote_code)
    gc.collect()
    check_room(opened.output, plan.bytes_to_write + parse_size("1MB"), held_bytes(opened.output))
    return fetched(plan, download)
