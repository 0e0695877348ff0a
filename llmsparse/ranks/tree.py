"""The order in which what batches leave behind is added up: a fixed binary tree, whatever the number of processes.

Sums of floats depend on their order. So batches are dealt to LEAVES leaves, each summed one batch after the other, and
leaves are added up in halves. A process takes leaves that lie side by side, sums what it can of the tree, and whoever
needs the total adds the rest in the tree's order: 1, 2, 4 and 8 processes give the same bits, and so does any other number.
What that costs a single process: `held_at_once` partial sums.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import TypeVar

LEAVES = 8  # so many processes have something to do

T = TypeVar("T")


def leaves_of(batches: int, most: int = LEAVES) -> list[range]:
    """Leaf → the numbers of its batches; at most so many leaves."""
    count = max(1, min(most, batches))
    return [range(leaf * batches // count, (leaf + 1) * batches // count) for leaf in range(count)]


def held_at_once(batches: int) -> int:
    """The most partial sums that are there while one process adds up all leaves of so many batches.

    >>> [held_at_once(batches) for batches in (1, 2, 3, 8, 128)]
    [1, 2, 3, 4, 4]
    """
    return 1 + (min(LEAVES, batches) - 1).bit_length()


def leaves_at(rank: int, size: int, leaves: int) -> range:
    """The leaves of one of `size` processes; the first one always has the first."""
    start, stop = (-(-one * leaves // size) for one in (rank, rank + 1))
    return range(start, stop)


def far_apart(leaves: int) -> list[int]:
    """All leaves, each far from those just before it: of every 2 that follow one another from the first on one lies in each
    half, of every 4 one in each quarter.

    >>> far_apart(8)
    [0, 4, 2, 6, 1, 5, 3, 7]
    """

    def dealt(span: range) -> list[int]:
        if len(span) < 2:
            return list(span)
        left, right = map(dealt, halves(span))
        return [leaf for pair in zip_longest(left, right) for leaf in pair if leaf is not None]

    return dealt(range(leaves))


def halves(span: range) -> tuple[range, range]:
    """Of leaves that lie side by side, those to be added up before the two sums are."""
    middle = span.start + (len(span) + 1) // 2
    return range(span.start, middle), range(middle, span.stop)


def subtrees(span: range, mine: range) -> list[range]:
    """The largest parts of the tree over `span` that `mine` is made of, from left to right."""
    if span.start >= mine.start and span.stop <= mine.stop:
        return [span]
    if span.stop <= mine.start or span.start >= mine.stop:
        return []
    return [found for half in halves(span) for found in subtrees(half, mine)]


def fold(span: range, leaf: Callable[[int], T], add: Callable[[T, T], T]) -> T:
    """The sum over the leaves in `span`; `add` may change and return its first argument."""
    if len(span) == 1:
        return leaf(span.start)
    left, right = halves(span)
    return add(fold(left, leaf, add), fold(right, leaf, add))
