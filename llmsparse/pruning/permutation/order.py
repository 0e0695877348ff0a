"""An order of channels under which N of every M keep more of a score: channels change places while that pays.

Groups of M meet in pairs, as in a tournament; of each pair the exchange of one channel for one that gains most is made.
What a group keeps with another channel in the place of one follows from what it keeps of the rest, so all M² exchanges of
all pairs take two distances in L1. Scores are of (rows, channels); the order is the same for all rows.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 512  # of a score that the search looks at; what counts in the end is all of them
WORK = 4e9  # numbers compared in all: bounds the time of a matrix, about 7 s of one CPU thread
LEAST_GAIN = 1e-4  # of what a pair keeps: less is not worth the time
AT_ONCE = 2**18  # numbers of a score that are sorted at once


@dataclass(frozen=True)
class Order:
    """`channels` (width,): which channel stands where; shares of the score's sum that are kept so, and kept as it was."""

    channels: Tensor
    before: float
    after: float


def better_order(score: Tensor, n: int, m: int, work: float = WORK) -> Order:
    """An order in which n of every m channels keep at least as much of `score` (rows, width), which is not negative."""
    rows, width = score.shape
    as_is = torch.arange(width, device=score.device)
    total = score.sum(dtype=torch.float64).item()
    before = retained(score, n, m)
    best, most = as_is, before
    if total > 0 and width > m:
        columns = score[:: -(-rows // ROWS)].T.contiguous()  # (width, some rows)
        dealt = dealt_out(columns.sum(1), m)
        starts = sorted((as_is, dealt), key=lambda order: -retained(score[:, order], n, m))
        found = exchanged(columns, starts[0], n, m, work)
        after = retained(score[:, found], n, m)  # of every row
        if after > before:
            best, most = found, after
    share = max(total, torch.finfo(torch.float64).tiny)
    return Order(best, before / share, most / share)


def retained(score: Tensor, n: int, m: int) -> float:
    """What n of every m consecutive columns keep of `score` (rows, width), added up in fp64."""
    step = max(1, AT_ONCE // score.shape[1])
    parts: list[Tensor] = list(score.split(step))
    return sum(float(part.reshape(-1, m).topk(n, dim=1).values.sum(dtype=torch.float64)) for part in parts)


def dealt_out(loudness: Tensor, m: int) -> Tensor:
    """The loudest channels one to a group, then the next ones in reverse, and so on."""
    ranked = loudness.sort(descending=True, stable=True).indices.view(m, -1).clone()
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.T.flatten()


def exchanged(columns: Tensor, order: Tensor, n: int, m: int, work: float) -> Tensor:
    """`order` after exchanges, until in one whole tournament none gains, or so many numbers were compared."""
    width, rows = columns.shape
    order = order.clone().view(-1, m)
    groups = Groups(columns[order], n)
    budget = int(work // (width * m * rows))
    while budget > 0:
        made = 0
        for one, other in meetings(len(order), columns.device):
            if budget == 0:
                break
            budget -= 1
            made += _exchange(groups, order, one, other)
        if not made:
            break
    return order.flatten()


class Groups:
    """Of every group what it keeps, and with each of its channels away what the rest keeps and what a newcomer must beat."""

    def __init__(self, score: Tensor, n: int) -> None:
        self.score, self._n = score, n  # (groups, m, rows)
        self.kept = score.new_zeros(score.shape[0])
        self.rest = score.new_zeros(score.shape[:2])  # summed over rows
        self.threshold = torch.empty_like(score)
        self.update(torch.arange(len(score), device=score.device))

    def update(self, changed: Tensor) -> None:
        """After channels of these groups changed."""
        score = self.score[changed]
        ranked = score.topk(self._n + 1, dim=1).values
        nth, next_one = ranked[:, -2:-1], ranked[:, -1:]
        top = ranked[:, :-1].sum(1)
        kept = score >= nth
        self.kept[changed] = top.sum(-1)
        self.rest[changed] = (top[:, None] - torch.where(kept, score, nth)).sum(-1)
        self.threshold[changed] = torch.where(kept, next_one, nth)


def _exchange(groups: Groups, order: Tensor, one: Tensor, other: Tensor) -> int:
    """Between each pair of groups the exchange that gains most, if one does; how many there were."""
    m = order.shape[1]
    a, b = groups.score[one], groups.score[other]  # (pairs, m, rows)
    of_one = _with_newcomer(groups, one, b)  # [p, i, j]: what `one` keeps with channel j of `other` in the place of i
    of_other = _with_newcomer(groups, other, a)
    kept = groups.kept[one] + groups.kept[other]
    gain, place = (of_one + of_other.transpose(1, 2) - kept[:, None, None]).flatten(1).max(1)
    pays = (gain > LEAST_GAIN * kept).nonzero()[:, 0]
    one, other, place = one[pays], other[pays], place[pays]
    i, j = place // m, place % m
    for of in (order, groups.score):
        moved = of[one, i]
        of[one, i] = of[other, j]
        of[other, j] = moved
    if len(pays):
        groups.update(torch.cat((one, other)))
    return len(pays)


def _with_newcomer(groups: Groups, numbers: Tensor, newcomers: Tensor) -> Tensor:
    """Σ rest + max(newcomer, threshold), by max(x, t) = (x + t + |x − t|) / 2."""
    threshold = groups.threshold[numbers]
    apart = torch.cdist(threshold, newcomers, p=1.0)
    largest = (threshold.sum(-1)[:, :, None] + newcomers.sum(-1)[:, None] + apart) / 2
    return groups.rest[numbers][:, :, None] + largest


def meetings(count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Rounds in which each of so many groups meets another, until every two have met (the circle method)."""
    even = count + count % 2
    ring = list(range(1, even))
    for turn in range(even - 1):
        seats = [0, *ring[turn:], *ring[:turn]]
        pairs = [(seats[k], seats[-1 - k]) for k in range(even // 2)]
        met = torch.tensor([pair for pair in pairs if max(pair) < count], device=device).view(-1, 2)
        yield met[:, 0], met[:, 1]
