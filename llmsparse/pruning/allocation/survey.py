"""The pass over the dense model that an allocation is made of, and the passes of a search; noted, so that a resumed run
goes on with the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse.calibration.inputs import Input, calibrate, learn_inputs
from llmsparse.calibration.passes import passes
from llmsparse.models.likelihood import negative_log_likelihood
from llmsparse.models.streamed import Activations, Block, Weight
from llmsparse.pruning.allocation.allocated import Allocated
from llmsparse.pruning.allocation.protocol import Allocation
from llmsparse.pruning.allocation.search import Candidate, Search
from llmsparse.pruning.allocation.units import Group, settle
from llmsparse.pruning.selection import Choice
from llmsparse.runs.run import Run
from llmsparse.runs.seeding import generator_for
from llmsparse.sparsity.patterns import Pattern
from llmsparse.sparsity.stats import Statistic

if TYPE_CHECKING:
    from llmsparse.pruning.plan import PrunePlan

LOOKED_TOKENS = 4096  # of the calibration text that the dense model is looked at with: more move a sparsity by 0.003
SEARCHED_TOKENS = 8192  # that a candidate's loss is of
NOTED = "allocation"


def allocate(run: Run[PrunePlan]) -> Allocated | None:
    """The sparsities of a run, found now or noted by an interrupted one; None where all are the same."""
    plan = run.plan
    if not plan.allocates:
        return None
    noted = run.fact(NOTED, lambda: _found(run))
    units, wished = noted["units"], list(noted["units"].values())
    patterns = settle(wished, plan.units, plan.allocated_sparsity, plan.bounds, plan.levels)
    return Allocated(_got(plan.units, patterns), patterns, noted["loss"]) if units else None


def with_patterns(choices: Mapping[str, list[Choice]], found: Allocated | None) -> dict[str, list[Choice]]:
    """The choices of every block, each with the pattern that it got."""
    patterns = found.patterns if found else {}
    return {
        block: [replace(choice, pattern=patterns.get(choice.weight.name, choice.pattern)) for choice in members]
        for block, members in choices.items()
    }


def first_batches(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Batches from the first on, at least one, until these are so many tokens."""
    taken: list[Tensor] = []
    for ids in batches:
        if taken and sum(one.numel() for one in taken) + ids.numel() > tokens:
            break
        taken.append(ids)
    return taken


def _got(groups: Sequence[Group], patterns: Mapping[str, Pattern]) -> dict[str, float]:
    """Unit → the sparsity of its first weight, whose share of rounding is as any other's."""
    return {group.unit.name: patterns[group.choices[0].weight.name].sparsity for group in groups}


@torch.no_grad()
def _found(run: Run[PrunePlan]) -> dict[str, Any]:
    """{"units": name → wished sparsity, "loss"}: JSON-able, for the journal."""
    plan, allocation = run.plan, run.plan.allocation
    names = [group.unit.name for group in plan.units]
    if isinstance(allocation, Search):
        best, loss = _searched(run, allocation)
        return {"units": dict(zip(names, best, strict=True)), "loss": loss}
    judged = _judged(run, allocation) if allocation.looks else [0.0] * len(names)
    wished = allocation.sparsities(judged, [group.unit for group in plan.units], plan.allocated_sparsity)
    return {"units": dict(zip(names, wished, strict=True)), "loss": {}}


def _judged(run: Run[PrunePlan], allocation: Allocation) -> list[float]:
    """What the allocation thinks of each unit."""
    groups = {name: [one for one in run.plan.units if one.block == name] for name in run.plan.model.block_names}
    return [
        allocation.judge([looks[choice.weight.name] for choice in group.choices])
        for block, looks in _looks(run, allocation)
        for group in groups[block]
    ]


def _looks(run: Run[PrunePlan], allocation: Allocation) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of the dense model, block by block: its name, and weight name → what `look` made of the weight."""
    plan, chosen = run.plan, {choice.weight.name for group in run.plan.units for choice in group.choices}
    acts = plan.model.embed(first_batches(plan.batches, LOOKED_TOKENS), plan.ranks) if allocation.needs else None
    for block in run.blocks():
        weights = [one.weight for one in plan.choices[block.name] if one.weight.name in chosen]
        yield block.name, _looked(run, block, acts, weights, allocation)


def _looked(
    run: Run[PrunePlan], block: Block, acts: Activations | None, weights: Sequence[Weight], allocation: Allocation
) -> dict[str, Any]:
    """Weight name → what `look` makes of each of these weights of a block, and of what is known of its input. `acts` go
    through the block."""
    if acts is None or not weights:
        if acts is not None:
            block.run(acts, into=acts)
        return {weight.name: allocation.look(block.view(weight), None) for weight in weights}

    def needs(entry: Input) -> type[Statistic] | None:
        return allocation.needs

    def look(entry: Input) -> dict[str, Any]:
        found = {weight.name: allocation.look(block.view(weight), entry.statistic) for weight in entry.weights}
        entry.forget()
        return found

    plan, looked = run.plan, dict[str, Any]()
    inputs = learn_inputs(block, acts, weights)
    groups = list(passes(inputs, needs, plan.options.statistics_budget, share=acts.share))
    for number, group in enumerate(groups, 1):
        advance = run.progress.batches(f"looking at {block.name}", len(acts.hidden))
        into = acts if number == len(groups) else None
        calibrate(block, acts, group, needs, device=plan.device, seed=plan.recipe.seed, advance=advance, into=into)
        for found in plan.ranks.divided(group, [entry.owner for entry in group], look):
            looked |= found
    return looked


def _searched(run: Run[PrunePlan], search: Search) -> tuple[Candidate, dict[str, float]]:
    """The best sparsities, and the losses of uniform and of these."""
    plan, losses_of_all = run.plan, list[float]()
    norms = {name: norm for _, looks in _looks(run, search) for name, norm in looks.items()}
    batches = first_batches(plan.batches, SEARCHED_TOKENS)
    tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in batches)

    def losses(candidates: list[Candidate]) -> list[float]:
        patterns = [settle(one, plan.units, plan.allocated_sparsity, plan.bounds, plan.levels) for one in candidates]
        found = [total / tokens for total in _likelihoods(run, batches, norms, patterns)]
        losses_of_all.extend(found)
        return found

    units, sparsity = [group.unit for group in plan.units], plan.allocated_sparsity
    found = search.run(units, sparsity, plan.bounds, generator_for("search", plan.recipe.seed), losses)
    return found.sparsities, {"uniform": losses_of_all[0], "found": found.loss}


def _likelihoods(
    run: Run[PrunePlan], batches: list[Tensor], norms: Mapping[str, Tensor], candidates: Sequence[Mapping[str, Pattern]]
) -> list[float]:
    """Σ −log p of the batches by the model pruned to each of the candidates' patterns, weight name → pattern, by Wanda's
    scores of the dense model: one pass over it."""
    model = run.plan.model
    start = model.embed(batches, run.plan.ranks)
    streams = [start.like(list(start.hidden)) for _ in candidates]
    for block in run.blocks():
        weights = [choice.weight for choice in run.plan.choices[block.name] if choice.weight.name in norms]
        keys = {weight.key for weight in weights}
        dense = {key: block.stored[key].clone() for key in keys}
        for patterns, stream in zip(candidates, streams, strict=True):
            for weight in weights:
                block.store(weight, _pruned(block.view(weight, dense), norms[weight.name], patterns[weight.name]))
            block.reload(keys)
            block.run(stream, into=stream)
    return [negative_log_likelihood(model, stream, batches) for stream in streams]


def _pruned(weight: Tensor, norm: Tensor, pattern: Pattern) -> Tensor:
    """(out, in) without what its scores say least for; an expert that no token reached goes by its weights alone."""
    score = weight.float().abs() * (norm if bool(norm.any()) else 1.0)
    return weight * pattern.keep(score, slice(0, weight.shape[1]), weight.shape[1])
