"""Calibration of a block: run the calibration batches through it and keep a statistic of every input.

A statistic belongs to an *input*, not to a weight: q, k and v share one, gate and up share one. Who shares is learned
on the first batch by the identity of the input tensors, while they are held (addresses are reused once a tensor is
freed), and checked on every later one. An expert has inputs of its own, made of its own tokens; where no token reaches
it, its input is empty, and empty tensors have no identity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError, NumericalError
from llmsparse.models.streamed import Activations, Block, Slot, Weight
from llmsparse.models.tap import Tap
from llmsparse.sparsity.stats import Statistic

SAMPLE_ROWS = 4096  # calibration rows kept of each input, at most, to measure output errors on
SAMPLE_SHARE = 32  # and at most one of so many, so that measuring costs little beside calibrating ...
LEAST_ROWS = 256  # ... but not fewer, which would tell nothing
ROUTED = ("router", "expert")  # kinds of weights in whose blocks tokens decide what runs
EXPERT_ROWS = 256  # the same for one of many experts, whose samples add up


@dataclass
class Input:
    """One input of a block and what calibration left of it."""

    slots: tuple[Slot, ...]  # where it enters, in call order
    weights: tuple[Weight, ...]  # the weights it is multiplied with
    calls: int | None = None  # how often every batch brings it; None where a router decides
    tokens: int = 0  # rows seen
    statistic: Statistic | None = None
    rows: list[Tensor] = field(default_factory=list[Tensor])  # a seeded sample of its rows, each (some, in)

    @property
    def width(self) -> int:
        return self.weights[0].shape[1]

    @property
    def sample(self) -> Tensor:
        """The sampled rows, (rows, in) in the compute dtype."""
        return torch.cat(self.rows)


def learn_inputs(block: Block, acts: Activations, weights: Sequence[Weight]) -> list[Input]:
    """Which of the weights share an input, in the order the block calls them, learned from the first batch.

    A weight that a block uses several times has one input, made of what it meets in all of them.
    """
    by_slot: dict[Slot, list[Weight]] = {}
    for weight in weights:
        by_slot.setdefault(weight.slot, []).append(weight)

    seen: dict[tuple[object, ...], list[Slot]] = {}
    held: list[Tensor] = []
    products = Counter[Slot]()

    def note(slot: Slot, x: Tensor) -> None:
        products[slot] += 1
        if x.numel() == 0:
            return
        held.append(x)
        slots = seen.setdefault(_identity(x), [])
        if slot in by_slot and slot not in slots:
            slots.append(slot)

    with torch.no_grad(), Tap(block, note):
        block.call(acts, 0)
    times = Counter(slot for slots in seen.values() for slot in slots)
    shared = [tuple(slot for slot in slots if times[slot] == 1) for slots in seen.values()]
    groups = [slots for slots in shared if slots]
    # by itself: what is used several times, on other inputs each, and experts that the first batch did not visit
    groups += [(slot,) for slot in by_slot if times[slot] != 1]
    inputs = [Input(slots, tuple(weight for slot in slots for weight in by_slot[slot])) for slots in groups]
    if not any(weight.kind in ROUTED for weight in block.weights):
        for entry in inputs:
            entry.calls = sum(products[slot] for slot in entry.slots)
    return inputs


def calibrate(
    block: Block,
    acts: Activations,
    inputs: Iterable[Input],
    needs: Callable[[Input], type[Statistic] | None],
    *,
    device: torch.device,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Fill `statistic`, `rows` and `tokens` of each input from one pass of all batches through the block.

    A batch ends with the last input that is wanted: what follows, in most blocks the product that is nearly a third of the
    FFN, is not computed.
    """
    inputs = list(inputs)
    lead: dict[Slot, Input] = {}
    followers: dict[Slot, Input] = {}
    for entry in inputs:
        needed = needs(entry)
        entry.statistic = needed(entry.width, device) if needed else None
        lead[entry.slots[0]] = entry
        followers.update(dict.fromkeys(entry.slots[1:], entry))
    current: dict[int, Tensor] = {}
    calls = [entry.calls for entry in inputs]
    enough = None if None in calls or 0 in calls else sum(filter(None, calls))
    seen = 0
    wanted = sample_rows(sum(hidden.shape[0] * hidden.shape[1] for hidden in acts.hidden))

    def update(slot: Slot, x: Tensor) -> None:  # x: (tokens, in)
        nonlocal seen
        note(slot, x)
        seen += slot in lead or slot in followers
        if seen == enough:
            raise _AllSeen

    def note(slot: Slot, x: Tensor) -> None:
        if x.numel() == 0:
            return
        if slot in followers:
            shared = current.get(id(followers[slot]))
            if shared is None or _identity(shared) != _identity(x):
                one, other = (_name_of(followers[slot], at) for at in (slot, followers[slot].slots[0]))
                raise CheckpointError(
                    f"{one}: has the input of {other} in one batch and another one in the next; leave it out with "
                    f"--exclude {one!r}"
                )
        if slot not in lead:
            return
        entry = lead[slot]
        current[id(entry)] = x
        entry.tokens += x.shape[0]
        if entry.statistic is not None:
            entry.statistic.update(x)
        quota = -(-(wanted if slot[1] is None else EXPERT_ROWS) // len(acts.hidden))
        entry.rows.append(x[_draw(x.shape[0], quota, seed + batch).to(x.device)])

    for batch in range(len(acts.hidden)):
        seen = 0
        with suppress(_AllSeen), torch.no_grad(), Tap(block, update):
            block.call(acts, batch)
        current.clear()
        advance()
    for entry in lead.values():
        if any(not torch.isfinite(rows).all() for rows in entry.rows):
            raise NumericalError(
                f"the activations that enter {entry.weights[0].name} are NaN or Inf; try --dtype float32, or check the model"
            )


class _AllSeen(Exception):
    """All that was wanted of a batch is known; the rest of the block need not run."""


def _name_of(entry: Input, slot: Slot) -> str:
    return next(weight.name for weight in entry.weights if weight.slot == slot)


def sample_rows(tokens: int) -> int:
    """How many of so many calibration rows are kept to measure output errors on."""
    return min(SAMPLE_ROWS, max(LEAST_ROWS, tokens // SAMPLE_SHARE))


def _draw(tokens: int, quota: int, seed: int) -> Tensor:
    """At most `quota` of `tokens` row numbers, drawn by the seed, in order."""
    if tokens <= quota:
        return torch.arange(tokens)
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:quota].sort().values


def _identity(x: Tensor) -> tuple[object, ...]:
    return (x.data_ptr(), x.shape, x.stride())
