"""Block matching: tune what pruning left of a block until the block computes what it did when it was dense.

With the mask frozen, minimise the error of the block's output on the inputs that the pruned prefix really produces (EBFT,
arXiv 2402.12419; "transformer matching" of 3BASiL). No gradient crosses a block boundary, so the memory is that of one
block and its Adam state. Or the mask is made on the way: `fading.py`.

The learning rate is a fraction of each weight's root mean square, found by a short probe on validation windows, so it
needs no tuning for a model. Masters are fp32 and start from what is stored; the validation error decides which step is
kept, and a block that does not improve stays as it was pruned. The errors reported are of other windows, which chose
neither rate nor step, where there are any.

Half precision is bfloat16, whatever the model computes in: an error of a token relative to its own norm, as a mean over
thousands of tokens, has gradients of 1e-9 and less in a large model, all of them 0 in float16. Adam does not care for
scale, so the loss that is backpropagated is scaled up besides, for what a model still does in float16.

Of several processes each has the batches that it holds, and every step takes some of each: their gradients are added up in
the tree of `ranks/tree.py`, so that all take the same step, which is that of one process alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from llmsparse.calibration.fading import Fading, rounds
from llmsparse.calibration.matching_loss import Loss
from llmsparse.calibration.tuner import Tuner
from llmsparse.models.streamed import Activations, Block
from llmsparse.ranks.tree import far_apart

TOKENS_PER_STEP = 1024  # or the block's width, if that is more
LEARNING_RATES = (1e-2, 3e-2, 1e-1)  # fractions of a weight's root mean square
PROBE_SHARE = 15  # one step of a probe for so many of the run, at most PROBE_STEPS
PROBE_STEPS = 20
FINAL_FRACTION = 0.05  # of the learning rate, at the end of the cosine
CHECKS = 8  # validation measurements in a run
HELD_OUT_SHARE = 8  # one batch in so many is for validation


@dataclass(frozen=True)
class Match:
    """What matching did to a block: its loss before and after, and how it got there."""

    before: float
    after: float
    steps: int
    learning_rate: float
    validation: bool  # the errors are of windows not trained on; False where calibration is one batch: training error
    improved: bool  # on the windows that chose; otherwise the block stayed as it was pruned
    of: str  # what the loss is of: the output (relative), or the logits (nats)


@dataclass(frozen=True)
class Matched:
    """Parameter name → fp32 values and keep-masks of a block, and the record."""

    values: dict[str, Tensor]
    keep: dict[str, Tensor]
    record: Match


@torch.enable_grad()
def match(
    block: Block,
    acts: Activations,
    loss: Loss,
    keep: Mapping[str, Tensor],
    *,
    steps: int,
    seed: int,
    autocast: torch.dtype | None = None,
    fading: Fading | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Matched:
    """Tune the parameters named in `keep` until the loss of the block's outputs for `acts` is small; zeros stay zero.

    `keep`: module parameter name → bool mask of its shape, True where a weight may move. With `fading` they start from the
    beginning that it has, and the masks are made on the way; it is kept only if it ends better than what is stored.
    The module itself is left with its old parameters.
    """
    share = acts.share
    validation, reported, train = shares(share.total)
    validated = not set(train) & set(validation)
    group = share.ranks.known(lambda: batches_per_step(*acts.hidden[0].shape, most=len(train)))
    tuner = Tuner(block, acts, loss, keep, autocast)

    before = tuner.error(reported)
    first = before if reported == validation else tuner.error(validation)
    best, best_error = (
        Matched(tuner.values(), tuner.keep, Match(before, before, steps, 0.0, validated, False, loss.of)),
        first,
    )
    rate = 0.0
    if steps:
        schedule = schedule_of(train, group, steps, seed, share.leaves)
        probing = schedule[: probe_steps(steps)]
        probes = {rate: tuner.probe(rate, probing, validation, best.values) for rate in LEARNING_RATES}
        rate = min(probes, key=lambda rate: probes[rate])
        fades = rounds(steps) if fading else {}
        if fading:
            start = fading.start(block)
            tuner.begin_fading(start, fading.keep(block, {name: start[name] for name in keep}, 0.0))
            tuner.fade(fading.keep(block, tuner.values(), fades.pop(0)))  # rates go by the weights that are left
        optimizer = tuner.start(rate)
        for step, batches in enumerate(schedule):
            if fading and step in fades:
                tuner.fade(fading.keep(block, tuner.values(), fades[step]))
            tuner.step(optimizer, batches, fraction_at(step, len(schedule)))
            advance()
            settled = not fades or step >= max(fades)
            if settled and ((step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps):
                error = tuner.error(validation)
                if error < best_error:
                    best, best_error = Matched(tuner.values(), tuner.keep, best.record), error
        if best_error < first:
            tuner.load(best.values)
            after = best_error if reported == validation else tuner.error(reported)
            best = replace(best, record=Match(before, after, steps, rate, validated, True, loss.of))
        else:
            best = replace(best, record=replace(best.record, learning_rate=rate))
    tuner.restore()
    return best


def shares(batches: int) -> tuple[list[int], list[int], list[int]]:
    """Batches that choose rate and step, that the errors reported are of, and that are trained on: an eighth, evenly
    spread, is for the first two by turns; a single one is for all."""
    held_out = list(range(0, batches, HELD_OUT_SHARE))
    train = [j for j in range(batches) if j % HELD_OUT_SHARE]
    return held_out[::2], held_out[1::2] or held_out, train or held_out


def fraction_at(step: int, steps: int) -> float:
    """Of the learning rate: a cosine from 1 to FINAL_FRACTION."""
    return FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * step / steps))


def probe_steps(steps: int) -> int:
    """Steps that each learning rate is tried for before a run of `steps`."""
    return min(PROBE_STEPS, max(1, steps // PROBE_SHARE))


def batches_per_step(windows: int, tokens: int, width: int, *, most: int) -> int:
    """How many batches of (windows, tokens, width) make one step of the optimiser: all `most` that there are at most."""
    return min(most, max(1, round(max(TOKENS_PER_STEP, width) / (windows * tokens))))


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """What products of a model that computes in `dtype` are matched in; None for float32. Only a GPU that has no products
    in bfloat16 of its own takes float16, where the scale of the loss alone keeps gradients from vanishing."""
    if dtype == torch.float32:
        return None
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def schedule_of(train: Sequence[int], group: int, steps: int, seed: int, leaves: Sequence[range]) -> list[list[int]]:
    """`steps` groups of batch numbers: epochs of a seeded shuffle, dealt so that every group has its batches from leaves
    that lie far apart, and so, of several processes, work for all."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * group:
        shuffled = [train[int(j)] for j in torch.randperm(len(train), generator=generator)]
        piles = [[batch for batch in shuffled if batch in leaves[leaf]] for leaf in far_apart(len(leaves))]
        order += [batch for layer in zip_longest(*piles) for batch in layer if batch is not None]
    return [order[step * group : (step + 1) * group] for step in range(steps)]
