"""One block: its inputs are measured, its weights pruned, what is left matched to the dense output.

Everything here reads and writes `block.stored`; the module stays dense until it is reloaded, so the statistics of later
inputs and the targets of matching are those of the dense block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import LlmsparseError
from llmsparse.models.streamed import HEAD, Activations, Block
from llmsparse.pruners import Magnitude
from llmsparse.pruning.inputs import Input, calibrate, learn_inputs
from llmsparse.pruning.matching import Match, match
from llmsparse.pruning.report import BlockRecord, PrunedWeight
from llmsparse.pruning.selection import Choice
from llmsparse.runs.progress import Progress
from llmsparse.runs.run import Made, Run
from llmsparse.runs.seeding import generator_for
from llmsparse.sparsity.stats import Statistic, combine


@dataclass(frozen=True)
class PruneOptions:
    """What the solver of a block is told, besides what to prune."""

    device: torch.device
    dtype: torch.dtype  # to run blocks in
    seed: int
    match_steps: int
    true_sequential: bool
    statistics_budget: int  # bytes of statistics that may be held at once


def finish_block(
    block: Block, acts: Activations, choices: Sequence[Choice], options: PruneOptions, run: Run
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
    targets: list[Tensor] = []
    matching = options.match_steps > 0 and block.name != HEAD

    def needs(entry: Input) -> type[Statistic] | None:
        return reduce(combine, (choices[weight.name].pruner.needs for weight in entry.weights))

    inputs = learn_inputs(block, acts, [choice.weight for choice in choices.values()])
    for number, group in enumerate(groups(inputs, needs, options)):
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
        for entry in group:
            for weight in entry.weights:
                begun = time.perf_counter()
                row, mask = prune_weight(block, choices[weight.name], entry, options)
                rows.append(row)
                keep[weight.name] = mask
                seconds[weight.name] = time.perf_counter() - begun
            entry.statistic = None
            entry.rows.clear()

    result: Match | None = None
    if matching:
        result = match_block(block, acts, targets, choices, keep, options, progress)
    order = list(choices)
    rows.sort(key=lambda row: order.index(row.name))
    seconds[block.name] = time.perf_counter() - started
    return BlockRecord(block.name, rows, asdict(result) if result else None, seconds)


def groups(
    inputs: list[Input], needs: Callable[[Input], type[Statistic] | None], options: PruneOptions
) -> Iterator[list[Input]]:
    """Inputs measured in one pass: as many as the memory for statistics allows; one by one when true-sequential."""
    held: list[Input] = []
    size = 0
    for entry in inputs:
        needed = needs(entry)
        bytes_needed = needed.nbytes(entry.width) if needed else 0
        if held and (options.true_sequential or size + bytes_needed > options.statistics_budget):
            yield held
            held, size = [], 0
        held.append(entry)
        size += bytes_needed
    yield held


def prune_weight(block: Block, choice: Choice, entry: Input, options: PruneOptions) -> tuple[PrunedWeight, Tensor]:
    """Prune one weight in `block.stored`; returns its report row and its keep-mask, (out, in) on the CPU."""
    weight, pruner, notes = choice.weight, choice.pruner, dict[str, Any]()
    stored = block.view(weight)  # (out, in), stored dtype
    if entry.tokens == 0:
        if weight.expert is None and weight.kind != "expert":
            raise LlmsparseError(
                f"no calibration token reached {weight.name}; leave it out with --exclude {weight.name!r}"
            )
        pruner = Magnitude()
        notes["fallback"] = "magnitude: no calibration token reached this expert"

    dense = stored.to(options.device, torch.float32, copy=True)
    generator = generator_for(weight.name, options.seed)
    pruned = pruner(dense, entry.statistic, choice.pattern, generator)
    notes |= pruned.notes
    block.store(weight, pruned.weight)
    row = PrunedWeight(
        name=weight.name,
        shape=weight.shape,
        method=choice.method,
        pattern=str(choice.pattern),
        sparsity_asked=choice.pattern.sparsity,
        sparsity=1 - torch.count_nonzero(block.view(weight)).item() / stored.numel(),
        error=output_error(dense, pruned.weight, entry),
        tokens=entry.tokens,
        notes=notes,
    )
    return row, pruned.keep.cpu()


def output_error(dense: Tensor, pruned: Tensor, entry: Input) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² over the sampled rows X (rows, in); NaN where no row was seen."""
    if entry.tokens == 0:
        return math.nan
    x = entry.sample.float()
    energy = (x @ dense.T).square().sum().item()
    return (x @ (dense - pruned).T).square().sum().item() / energy if energy > 0 else 0.0


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
        autocast=None if options.dtype == torch.float32 else options.dtype,
        advance=progress.batches(f"matching {block.name}", options.match_steps),
    )
    if not result.after < result.before:
        return result
    on_disk = block.on_disk(tuned)
    for choice in choices.values():
        values = block.view(choice.weight, on_disk)  # (out, in) fp32
        block.store(choice.weight, values * keep[choice.weight.name].to(values.device))
    return result
