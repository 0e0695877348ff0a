"""One block: watched whole on the calibration batches, cut, and what is left fitted to what the whole one did."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmsparse.calibration.matching import Match, autocast_dtype, match
from llmsparse.calibration.matching_loss import LogitDivergence, Loss, OutputError
from llmsparse.models.streamed import Activations, Block, StreamedModel
from llmsparse.runs.progress import Progress
from llmsparse.runs.run import Made
from llmsparse.shrinking.logit_fit import fit_to_logits
from llmsparse.shrinking.reduction import Cut, Reduction, Sum
from llmsparse.storage.heap import release_freed


@dataclass(frozen=True)
class ShrinkOptions:
    """What the work on a block is told, besides what to cut."""

    reductions: Sequence[Reduction]
    refit: bool
    match_steps: int
    seed: int
    device: torch.device
    dtype: torch.dtype  # to run blocks in


@dataclass(frozen=True)
class BlockRecord:
    """What the journal keeps of a finished block."""

    name: str
    rows: dict[str, dict[str, Any]]  # name of a reduction → what it says of the block
    match: dict[str, Any] | None  # relative output error before and after block matching
    seconds: float
    logits: dict[str, Any] | None = None  # what fitting the last block to the source's logits gained

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> BlockRecord:
        return cls(entry["name"], entry["rows"], entry["match"], entry["seconds"], entry.get("logits"))


@torch.no_grad()
def shrink_block(
    block: Block,
    target: int,
    made: StreamedModel,
    watched: Activations,
    entering: Activations,
    options: ShrinkOptions,
    progress: Progress,
    onwards: bool = False,
    aims: Activations | None = None,
) -> Made[BlockRecord]:
    """The on-disk tensors of block `target` of `made`, and what is to be said of them.

    `watched` enters the whole block, and is taken through it where it goes `onwards`; `entering` enters the made one: the
    same batches behind what has been made, with the arguments that blocks of `made` are called with. `aims`: what the
    source's own blocks make of them, behind this one, where the made block should come to that. Evicts `block`.
    """
    started = time.perf_counter()
    cuts = {reduction.name: reduction.begin(block) for reduction in options.reductions}
    outputs: list[Tensor] = []
    if onwards or options.match_steps or any(cut.watches for cut in cuts.values()):
        advance = progress.batches(f"watching {block.name}", len(watched.hidden))
        outputs = watch(block, watched, list(cuts.values()), bool(options.match_steps), onwards, advance, aims)

    tensors = dict(block.stored)
    for cut in cuts.values():
        tensors = cut.cut(tensors)
    block.evict()
    release_freed()
    result = {key: tensor.contiguous() for key, tensor in tensors.items()}
    rows = {name: row for name, cut in cuts.items() if (row := cut.row())}
    fitted = matched = None
    if options.refit or options.match_steps:
        made_block = made.block(target, result)
        if options.refit:
            for cut in cuts.values():
                cut.refit(made_block, entering)
        rows = {name: row for name, cut in cuts.items() if (row := cut.row())}
        last = made_block.name == made.block_names[-1]
        if options.refit and aims and last and rows:
            fitted = fit_to_logits(made_block, entering, made, aims.hidden)
        if options.match_steps and rows:
            for cut in cuts.values():
                outputs = cut.aim(outputs)
            loss: Loss = OutputError(aims.hidden if aims else outputs)
            if aims and last:
                loss = LogitDivergence(made, aims.hidden)
            matched = match_made(made_block, entering, loss, options, progress)
        result = made_block.stored
        made_block.evict()
    seconds = time.perf_counter() - started
    return Made(result, BlockRecord(block.name, rows, asdict(matched) if matched else None, seconds, fitted))


def watch(
    block: Block,
    acts: Activations,
    cuts: Sequence[Cut],
    keep: bool,
    onwards: bool,
    advance: Callable[[], None],
    aims: Activations | None = None,
) -> list[Tensor]:
    """Run every batch that is held here through the block, which is whole; returns its outputs where they are to be kept.
    `onwards` they take the place of the inputs. What they lack of `aims` is told to the cuts."""
    share, outputs = acts.share, list[Tensor]()
    for cut in cuts:
        cut.learn(acts, aims)

    def leaf(number: int) -> list[Sum]:
        sums = [one for cut in cuts for one in cut.begin_sums(number)]
        for batch in share.leaves[number]:
            place = share.place(batch)
            hidden = acts.hidden[place]
            with ExitStack() as stack:
                for cut in cuts:
                    stack.enter_context(cut.watching(batch))
                output = block.call(acts, place).to(hidden.device)
            for cut in cuts:
                cut.watched(output, aims.hidden[place] if aims else None)
            if keep:
                outputs.append(output)
            if onwards:
                acts.hidden[place] = output
            advance()
        return sums

    owners = [cut.owners(share.ranks) for cut in cuts]
    totals = iter(share.summed(leaf, lambda one, other: one.merge(other), [one for some in owners for one in some]))
    for cut, some in zip(cuts, owners, strict=True):
        cut.take_sums([next(totals) for _ in some])
    return outputs


def match_made(made: Block, acts: Activations, loss: Loss, options: ShrinkOptions, progress: Progress) -> Match:
    """Tune every matrix of the made block, routers aside, so that the loss of its output is small; what is 0 in them stays 0."""
    weights = [weight for weight in made.weights if weight.prunable]
    free = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in made.stored.items()}
    for weight in weights:
        made.view(weight, free).copy_(made.view(weight) != 0)
    movable = {name: mask for name, mask in made.in_module(free).items() if mask.any()}
    matched = match(
        made,
        acts,
        loss,
        movable,
        steps=options.match_steps,
        seed=options.seed,
        autocast=autocast_dtype(options.dtype, options.device),
        advance=progress.batches(f"matching {made.name}", options.match_steps),
    )
    if matched.record.improved:
        on_disk = made.on_disk(matched.values)
        made.stored = {key: tensor.clone() for key, tensor in made.stored.items()}
        with acts.share.ranks.together():
            for weight in weights:
                made.store(weight, made.view(weight, on_disk))
    return matched.record
