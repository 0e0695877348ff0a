"""One block: its inputs are measured, its weights pruned, what is left matched to the dense output.

Everything here reads and writes `block.stored`; the module stays dense until it is reloaded, so the statistics of later
inputs and the targets of matching are those of the dense block.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.calibration.inputs import Input, calibrate, learn_inputs
from llmsparse.calibration.matching import Match, autocast_dtype, match
from llmsparse.calibration.passes import output_error, passes
from llmsparse.models.streamed import HEAD, Activations, Block
from llmsparse.pruners import Pruned
from llmsparse.pruning.report import BlockRecord, PrunedWeight
from llmsparse.pruning.selection import Choice
from llmsparse.pruning.starved import pruner_that_fits
from llmsparse.runs.progress import Progress
from llmsparse.runs.run import Made, Run
from llmsparse.runs.seeding import generator_for
from llmsparse.sparsity.patterns import SPARSE, KeepingZeros
from llmsparse.sparsity.stats import Statistic, combine


@dataclass(frozen=True)
class PruneOptions:
    """What the solver of a block is told, besides what to prune."""

    device: torch.device
    dtype: torch.dtype  # to run blocks in
    seed: int
    match_steps: int
    true_sequential: bool
    keep_zeros: bool
    calibration_tokens: int
    statistics_budget: int  # bytes of statistics that may be held at once


def finish_block(
    block: Block, acts: Activations, choices: Sequence[Choice], options: PruneOptions, run: Run[Any]
) -> BlockRecord:
    """Leave `block` pruned, as it is on disk: pruned now, or read back from an interrupted run."""
    keys = sorted({choice.weight.key for choice in choices})

    def make() -> Made[BlockRecord]:
        record = prune_block(block, acts, choices, options, run.progress)
        return Made({key: block.stored[key] for key in keys}, record)

    made = run.block(block.name, BlockRecord, make)
    block.stored.update(made.tensors)
    block.reload(keys)  # what runs on is what was stored, rounded to its dtype
    return made.record


@torch.no_grad()
def prune_block(
    block: Block, acts: Activations, chosen: Sequence[Choice], options: PruneOptions, progress: Progress
) -> BlockRecord:
    """Prune the chosen weights of a dense block in `block.stored`, and match its output to the dense block's."""
    started = time.perf_counter()
    choices = {choice.weight.name: choice for choice in chosen}
    if not choices:
        return BlockRecord(block.name, [], None, {})
    rows: list[PrunedWeight] = []
    seconds: dict[str, float] = {}
    keep: dict[str, Tensor] = {}
    zeros_at: dict[str, Tensor] = {}  # of weights that were sparse already
    targets: list[Tensor] = []
    matching = options.match_steps > 0 and block.name != HEAD

    def needs(entry: Input) -> type[Statistic] | None:
        return reduce(combine, (choices[weight.name].pruner.needs for weight in entry.weights))

    def prune_weights(entry: Input) -> list[Solved]:
        solved = [prune_weight(block, choices[weight.name], entry, options) for weight in entry.weights]
        entry.forget()
        return solved

    ranks, one_by_one = acts.share.ranks, options.true_sequential
    inputs = learn_inputs(block, acts, [choice.weight for choice in choices.values()])
    for number, group in enumerate(
        passes(inputs, needs, options.statistics_budget, one_by_one=one_by_one, share=acts.share)
    ):
        if number and options.true_sequential:
            block.reload()  # later inputs see the weights pruned so far; otherwise the module stays dense
        outputs = calibrate(
            block,
            acts,
            group,
            needs,
            device=options.device,
            seed=options.seed,
            advance=progress.batches(f"calibrating {block.name}", len(acts.hidden)),
            keep_output=matching and number == 0,
        )
        targets = targets or outputs
        owners = [entry.owner for entry in group]
        for solved in chain.from_iterable(ranks.divided(group, owners, prune_weights)):
            row = solved.row
            rows.append(row)
            block.view(choices[row.name].weight).copy_(solved.stored)
            seconds[row.name] = solved.seconds
            if solved.keep is not None:
                keep[row.name] = solved.keep
            if solved.zeros is not None:
                zeros_at[row.name] = solved.zeros

    result: Match | None = None
    if matching:
        result = match_block(block, acts, targets, choices, keep, options, progress)
        if result.improved:
            rows = [as_matched(row, block.view(choices[row.name].weight), zeros_at.get(row.name)) for row in rows]
    order = list(choices)
    rows.sort(key=lambda row: order.index(row.name))
    seconds[block.name] = time.perf_counter() - started
    return BlockRecord(block.name, rows, asdict(result) if result else None, seconds)


class Solved(NamedTuple):
    """A pruned weight. Masks are on the CPU, and there where matching will ask for them."""

    row: PrunedWeight
    stored: Tensor  # (out, in), as rounded to the stored dtype
    keep: Tensor | None  # (out, in) bool
    zeros: Tensor | None  # (out, in) bool: where it was 0 before, if it was sparse already
    seconds: float


def prune_weight(block: Block, choice: Choice, entry: Input, options: PruneOptions) -> Solved:
    """Prune one weight in `block.stored`."""
    begun, weight, pattern = time.perf_counter(), choice.weight, choice.pattern
    stored = block.view(weight)  # (out, in), stored dtype
    pruner, fallback = pruner_that_fits(choice, entry, options.calibration_tokens)
    notes: dict[str, Any] = {"fallback": fallback} if fallback else {}

    dense = stored.to(options.device, torch.float32, copy=True)
    zeros = dense == 0
    if options.keep_zeros:
        pattern = KeepingZeros(pattern, zeros)
    pruned = pruner(dense, entry.statistic, pattern, generator_for(weight.name, options.seed))
    if options.keep_zeros:  # whatever a method makes of the mask
        pruned = Pruned.of(pruned.weight, pruned.keep & ~zeros, **pruned.notes)
    notes |= pruned.notes | zeros_before(zeros, pruned.weight != 0)
    left = block.store(weight, pruned.weight)
    row = PrunedWeight(
        name=weight.name,
        shape=weight.shape,
        method=choice.method,
        pattern=str(choice.pattern),
        sparsity_asked=choice.pattern.sparsity,
        sparsity=1 - left / stored.numel(),
        error=output_error(dense, pruned.weight, entry),
        tokens=entry.tokens,
        notes=notes,
    )
    if not options.match_steps or block.name == HEAD:
        return Solved(row, stored, None, None, time.perf_counter() - begun)
    sparse = zeros.cpu() if "zeros_before" in row.notes else None
    return Solved(row, stored, pruned.keep.cpu(), sparse, time.perf_counter() - begun)


def as_matched(row: PrunedWeight, stored: Tensor, zeros: Tensor | None) -> PrunedWeight:
    """The row of a weight whose survivors matching has moved, zeros of the source that the method kept among them."""
    notes = row.notes | (zeros_before(zeros, stored != 0) if zeros is not None else {})
    return replace(row, sparsity=1 - int(stored.count_nonzero()) / stored.numel(), notes=notes)


def zeros_before(zeros: Tensor, moved: Tensor) -> dict[str, Any]:
    """Of a weight that was sparse already: the share of it that was 0, and how many of these are no longer."""
    share = zeros.count_nonzero().item() / zeros.numel()
    return {"zeros_before": share, "zeros_returned": int((zeros & moved).sum())} if share > SPARSE else {}


def match_block(
    block: Block,
    acts: Activations,
    targets: list[Tensor],
    choices: dict[str, Choice],
    keep: dict[str, Tensor],
    options: PruneOptions,
    progress: Progress,
) -> Match:
    """Tune the surviving weights so that the block's output comes back to the dense one's; updates `block.stored`."""
    block.reload()
    free = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in block.stored.items()}
    for choice in choices.values():
        block.view(choice.weight, free).copy_(keep[choice.weight.name])
    movable = {name: mask for name, mask in block.in_module(free).items() if mask.any()}
    tuned, result = match(
        block,
        acts,
        targets,
        movable,
        steps=options.match_steps,
        seed=options.seed,
        autocast=autocast_dtype(options.dtype, options.device),
        advance=progress.batches(f"matching {block.name}", options.match_steps),
    )
    if not result.improved:
        return result
    on_disk = block.on_disk(tuned)
    for choice in choices.values():
        values = block.view(choice.weight, on_disk)  # (out, in) fp32
        block.store(choice.weight, values * keep[choice.weight.name].to(values.device))
    return result
