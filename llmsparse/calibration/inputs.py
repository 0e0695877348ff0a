"""Calibration of a block: run the calibration batches through it and keep a statistic of every input.

A statistic belongs to an *input*, not to a weight: q, k and v share one, gate and up share one. Who shares is learned
on the first batch by the identity of the input tensors, while they are held (addresses are reused once a tensor is
freed), and checked on every later one. An expert has inputs of its own, made of its own tokens; where no token reaches
it, its input is empty, and empty tensors have no identity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError, NumericalError
from llmsparse.models.streamed import Activations, Block, Slot, Weight
from llmsparse.models.tap import Tap
from llmsparse.ranks.share import Share
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
    owner: int = 0  # the process that keeps what follows, and works on the weights
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

    def forget(self) -> None:
        """Let go of what was measured."""
        self.statistic = None
        self.rows = []


def learn_inputs(block: Block, acts: Activations, weights: Sequence[Weight]) -> list[Input]:
    """Which of the weights share an input, in the order the block calls them, learned from the first batch.

    A weight that a block uses several times has one input, made of what it meets in all of them.
    """
    by_slot: dict[Slot, list[Weight]] = {}
    for weight in weights:
        by_slot.setdefault(weight.slot, []).append(weight)
    groups, products = acts.share.ranks.known(lambda: _who_shares(block, acts, by_slot))
    inputs = [Input(slots, tuple(weight for slot in slots for weight in by_slot[slot])) for slots in groups]
    if not any(weight.kind in ROUTED for weight in block.weights):
        for entry in inputs:
            entry.calls = sum(products[slot] for slot in entry.slots)
    return inputs


def _who_shares(
    block: Block, acts: Activations, slots: Collection[Slot]
) -> tuple[list[tuple[Slot, ...]], Counter[Slot]]:
    """The slots of each input, and how many products each slot is met in."""
    seen: dict[tuple[object, ...], list[Slot]] = {}
    held: list[Tensor] = []
    products = Counter[Slot]()

    def note(slot: Slot, x: Tensor) -> None:
        products[slot] += 1
        if x.numel() == 0:
            return
        held.append(x)
        sharing = seen.setdefault(_identity(x), [])
        if slot in slots and slot not in sharing:
            sharing.append(slot)

    with torch.no_grad(), Tap(block, note):
        block.call(acts, 0)
    times = Counter(slot for sharing in seen.values() for slot in sharing)
    shared = [tuple(slot for slot in sharing if times[slot] == 1) for sharing in seen.values()]
    groups = [sharing for sharing in shared if sharing]
    # by itself: what is used several times, on other inputs each, and experts that the first batch did not visit
    groups += [(slot,) for slot in slots if times[slot] != 1]
    return groups, products


def calibrate(
    block: Block,
    acts: Activations,
    inputs: Iterable[Input],
    needs: Callable[[Input], type[Statistic] | None],
    *,
    device: torch.device,
    seed: int,
    advance: Callable[[], None] = lambda: None,
    sampled: int | None = None,
    into: Activations | None = None,
) -> None:
    """Fill `statistic`, `rows` and `tokens` of each input from one pass of all batches through the block; of several
    processes at the one that owns the input.

    `sampled` rows are kept of an input, or so many as errors are measured on. A batch ends with the last input that is wanted:
    what follows, in most blocks the product that is nearly a third of the FFN, is not computed; unless the block's outputs
    are wanted `into`, which may be `acts` itself.
    """
    inputs, share = list(inputs), acts.share
    watcher = _Watcher(inputs, share, seed, sampled or sample_rows(share.tokens), whole=into is not None)

    def leaf(number: int) -> list[Seen]:
        found = watcher.begin([needed(entry.width, device) if (needed := needs(entry)) else None for entry in inputs])
        for batch in share.leaves[number]:
            watcher.batch = batch
            with suppress(_AllSeen), torch.no_grad(), Tap(block, watcher):
                place = share.place(batch)
                output = block.call(acts, place)
                if into is not None:
                    into.hidden[place] = output.to(acts.hidden[place].device)
            advance()
        return found

    totals = share.summed(leaf, Seen.merge, [entry.owner for entry in inputs])
    for entry, seen in zip(inputs, totals, strict=True):
        seen = seen or Seen(None)
        entry.statistic, entry.rows, entry.tokens = seen.statistic, seen.rows, seen.tokens
    with share.ranks.together():
        _refuse_broken(inputs)


def _refuse_broken(inputs: Iterable[Input]) -> None:
    for entry in inputs:
        if any(not torch.isfinite(rows).all() for rows in entry.rows):
            raise NumericalError(
                f"the activations that enter {entry.weights[0].name} are NaN or Inf; try --dtype float32, or check the model"
            )


@dataclass
class Seen:
    """What some batches left behind of one input."""

    statistic: Statistic | None
    rows: list[Tensor] = field(default_factory=list[Tensor])
    tokens: int = 0

    def merge(self, other: Seen) -> Seen:
        """This, with later batches."""
        self.rows += other.rows
        self.tokens += other.tokens
        if self.statistic is not None and other.statistic is not None:
            self.statistic.merge(other.statistic)
        return self


class _Watcher:
    """Called with what enters each weight of a block: takes down of every input what is wanted of it."""

    def __init__(self, inputs: list[Input], share: Share, seed: int, rows: int, *, whole: bool) -> None:
        self._number = {slot: number for number, entry in enumerate(inputs) for slot in entry.slots}
        self._inputs, self._share, self._seed = inputs, share, seed
        self._found: list[Seen] = []
        self._current: dict[int, Tensor] = {}
        self._met = 0
        calls = [entry.calls for entry in inputs]
        self._enough = None if whole or None in calls or 0 in calls else sum(filter(None, calls))
        self._rows = rows

    def begin(self, statistics: Sequence[Statistic | None]) -> list[Seen]:
        """From here on other sums, one an input."""
        self._found = [Seen(statistic) for statistic in statistics]
        return self._found

    @property
    def batch(self) -> int:
        """The number of the batch that is seen, among those of all processes."""
        return self._batch

    @batch.setter
    def batch(self, number: int) -> None:
        self._batch, self._met = number, 0
        self._current.clear()

    def __call__(self, slot: Slot, x: Tensor) -> None:  # x: (tokens, in)
        if slot not in self._number:
            return
        self._note(slot, x)
        self._met += 1
        if self._met == self._enough:
            raise _AllSeen

    def _note(self, slot: Slot, x: Tensor) -> None:
        if x.numel() == 0:
            return
        number = self._number[slot]
        entry, seen = self._inputs[number], self._found[number]
        if slot != entry.slots[0]:
            shared = self._current.get(number)
            if shared is None or _identity(shared) != _identity(x):
                one, other = (_name_of(entry, at) for at in (slot, entry.slots[0]))
                raise CheckpointError(
                    f"{one}: has the input of {other} in one batch and another one in the next; leave it out with "
                    f"--exclude {one!r}"
                )
            return
        self._current[number] = x
        seen.tokens += x.shape[0]
        if seen.statistic is not None:
            seen.statistic.update(x)
        quota = -(-(self._rows if slot[1] is None else EXPERT_ROWS) // self._share.total)
        seen.rows.append(x[_draw(x.shape[0], quota, self._seed + self._batch).to(x.device)])


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
