"""One block: its inputs are measured, its weights pruned, what is left matched to the dense output.

Everything here reads and writes `block.stored`; the module stays dense until it is reloaded, so the statistics of later
inputs and the targets of matching are those of the dense block.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.calibration.fading import at_once
from llmsparse.calibration.inputs import Input, calibrate, learn_inputs
from llmsparse.calibration.matching import Match
from llmsparse.calibration.passes import output_error, passes
from llmsparse.models.streamed import HEAD, Activations, Block
from llmsparse.pruners import Pruned
from llmsparse.pruning.matched import fading_of, match_block
from llmsparse.pruning.options import PruneOptions
from llmsparse.pruning.permutation.reorder import reorder_block
from llmsparse.pruning.report import BlockRecord, PrunedWeight
from llmsparse.pruning.selection import Choice
from llmsparse.pruning.starved import pruner_that_fits
from llmsparse.runs.progress import Progress
from llmsparse.runs.run import Made, Run
from llmsparse.runs.seeding import generator_for
from llmsparse.sparsity.partway import partway
from llmsparse.sparsity.patterns import SPARSE, KeepingZeros, Pattern
from llmsparse.sparsity.stats import InputNorm, Statistic, combine


def finish_block(
    block: Block,
    acts: Activations,
    aims: Activations | None,
    choices: Sequence[Choice],
    options: PruneOptions,
    run: Run[Any],
) -> BlockRecord:
    """Leave `block` pruned, as it is on disk: pruned now, or read back from an interrupted run."""
    moved = {key for fold in options.folds.get(block.name, ()) for key in fold.keys}
    keys = sorted(moved | {choice.weight.key for choice in choices})

    def make() -> Made[BlockRecord]:
        record = prune_block(block, acts, choices, options, run.progress, aims)
        return Made({key: block.stored[key] for key in keys}, record)

    made = run.block(block.name, BlockRecord, make)
    block.stored.update(made.tensors)
    block.reload(keys)  # what runs on is what was stored, rounded to its dtype
    return made.record


@torch.no_grad()
def prune_block(
    block: Block,
    acts: Activations,
    chosen: Sequence[Choice],
    options: PruneOptions,
    progress: Progress,
    aims: Activations | None = None,
) -> BlockRecord:
    """Prune the chosen weights of a dense block in `block.stored`, and match its output to `aims`, if there are any."""
    started = time.perf_counter()
    choices = {choice.weight.name: choice for choice in chosen}
    if not choices:
        return BlockRecord(block.name, [], None, {})
    permuted = reorder_block(block, acts, chosen, options.folds.get(block.name, ()), options, progress)
    rows: list[PrunedWeight] = []
    seconds: dict[str, float] = {}
    keep: dict[str, Tensor] = {}
    zeros_at: dict[str, Tensor] = {}  # of weights that were sparse already
    norms: dict[str, Tensor] = {}
    loss = None if aims is None or block.name == HEAD else options.loss_of(block.name, aims)
    fading = loss is not None and options.fading
    beginning = {key: block.stored[key].clone() for key in {choice.weight.key for choice in chosen}} if fading else {}

    def needs(entry: Input) -> type[Statistic] | None:
        least = InputNorm if fading else None
        return reduce(combine, (choices[weight.name].pruner.needs for weight in entry.weights), least)

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
        calibrate(
            block,
            acts,
            group,
            needs,
            device=options.device,
            seed=options.seed,
            advance=progress.batches(f"calibrating {block.name}", len(acts.hidden)),
        )
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
            if solved.norm is not None:
                norms[row.name] = solved.norm
            if solved.beginning is not None:
                block.view(choices[row.name].weight, beginning).copy_(solved.beginning)

    result: Match | None = None
    if loss:
        fades = (
            fading_of(choices.values(), norms, zeros_at if options.keep_zeros else {}, beginning) if fading else None
        )
        result = match_block(block, acts, loss, choices, keep, fades, options, progress)
        if result.improved:
            rows = [as_matched(row, block.view(choices[row.name].weight), zeros_at.get(row.name)) for row in rows]
    order = list(choices)
    rows.sort(key=lambda row: order.index(row.name))
    seconds[block.name] = time.perf_counter() - started
    return BlockRecord(block.name, rows, asdict(result) if result else None, seconds, permuted)


class Solved(NamedTuple):
    """A pruned weight. Masks and norms are on the CPU, and there where matching will ask for them."""

    row: PrunedWeight
    stored: Tensor  # (out, in), as rounded to the stored dtype
    keep: Tensor | None  # (out, in) bool
    zeros: Tensor | None  # (out, in) bool: where it was 0 before, if it was sparse already, or zeros are kept
    norm: Tensor | None  # (in,) of its inputs, where it is to fade
    beginning: Tensor | None  # (out, in) from where it is to fade, unless that is the dense weight
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

    def make(pattern: Pattern) -> Pruned:
        made = pruner(dense, entry.statistic, pattern, generator_for(weight.name, options.seed))
        # a method makes of the mask what it likes
        return Pruned.of(made.weight, made.keep & ~zeros, **made.notes) if options.keep_zeros else made

    fades = options.fading and options.match_steps > 0 and block.name != HEAD
    beginning: Tensor | None = None
    if fades and pruner.needs is not None:
        beginning = make(partway(pattern, at_once(options.match_steps))).weight.to("cpu", stored.dtype)
    pruned = make(pattern)
    notes |= pruned.notes | zeros_before(zeros, pruned.weight != 0)
    left = block.store(weight, pruned.weight)
    row = PrunedWeight(
        name=weight.name,
        shape=weight.shape,
        method=choice.method,
        pattern=str(choice.pattern),
        sparsity_asked=choice.pattern.sparsity,
        sparsity=1 - left / stored.numel(),
        error=output_error(dense, lambda rows: pruned.weight[rows], entry),
        tokens=entry.tokens,
        notes=notes,
    )
    if not options.match_steps or block.name == HEAD:
        return Solved(row, stored, None, None, None, None, time.perf_counter() - begun)
    sparse = zeros.cpu() if "zeros_before" in row.notes or options.keep_zeros else None
    norm = entry.statistic.norm.cpu() if fades and isinstance(entry.statistic, InputNorm) else None
    return Solved(row, stored, pruned.keep.cpu(), sparse, norm, beginning, time.perf_counter() - begun)


def as_matched(row: PrunedWeight, stored: Tensor, zeros: Tensor | None) -> PrunedWeight:
    """The row of a weight whose survivors matching has moved, zeros of the source that the method kept among them."""
    notes = row.notes | (zeros_before(zeros, stored != 0) if zeros is not None else {})
    return replace(row, sparsity=1 - int(stored.count_nonzero()) / stored.numel(), notes=notes)


def zeros_before(zeros: Tensor, moved: Tensor) -> dict[str, Any]:
    """Of a weight that was sparse already: the share of it that was 0, and how many of these are no longer."""
    share = zeros.count_nonzero().item() / zeros.numel()
    return {"zeros_before": share, "zeros_returned": int((zeros & moved).sum())} if share > SPARSE else {}
