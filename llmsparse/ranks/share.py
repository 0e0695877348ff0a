"""Which batches of a stream this process holds, and how its sums become those of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

from llmsparse.ranks.group import Ranks
from llmsparse.ranks.tree import LEAVES, fold, halves, held_at_once, leaves_at, leaves_of, subtrees

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class Share:
    """The batches that process `ranks.rank` holds, of all that there are: `shapes` are (windows, tokens) of each of these. They
    are dealt to at most `most` leaves."""

    ranks: Ranks
    shapes: tuple[tuple[int, int], ...]
    most: int = LEAVES

    @property
    def total(self) -> int:
        """Batches of all processes."""
        return len(self.shapes)

    @property
    def tokens(self) -> int:
        """Of all processes."""
        return sum(windows * tokens for windows, tokens in self.shapes)

    @cached_property
    def leaves(self) -> list[range]:
        """Leaf of the tree → the numbers of its batches."""
        return leaves_of(self.total, self.most)

    @cached_property
    def numbers(self) -> range:
        """Of the batches held here, among all."""
        return self._numbers_at(self.ranks.rank)

    @property
    def most_tokens(self) -> int:
        """Of the batches that one process holds, at most. Leaves do not all have as many batches, and the first process need
        not have the most."""
        held = [self._numbers_at(rank) for rank in range(self.ranks.size)]
        return max(sum(self.shapes[number][0] * self.shapes[number][1] for number in numbers) for numbers in held)

    def first_batches(self, tokens: int) -> int:
        """How many batches hold so many tokens, from the first on; all of them where they do not."""
        held = accumulate(windows * length for windows, length in self.shapes)
        return next((number for number, some in enumerate(held, 1) if some >= tokens), self.total)

    def tokens_before(self, leaf: int) -> int:
        """Of all batches that come before those of a leaf."""
        return sum(windows * tokens for windows, tokens in self.shapes[: self.leaves[leaf].start])

    @property
    def sums_at_once(self) -> int:
        """The most partial sums that are there while leaves are added up: a process's own, and one that comes from another."""
        return held_at_once(-(-len(self.leaves) // self.ranks.size)) + (self.ranks.size > 1)

    def take(self, batches: Sequence[T]) -> list[T]:
        """Those of all batches that are held here."""
        return [batches[number] for number in self.numbers]

    def place(self, batch: int) -> int:
        """Where a batch that is held here stands among those."""
        return self.numbers.index(batch)

    def collected(self, values: Mapping[int, V]) -> dict[int, V]:
        """Values of batches or leaves, by their numbers in order, from all processes."""
        found = {number: value for part in self.ranks.gather(dict(values)) for number, value in part.items()}
        return dict(sorted(found.items()))

    def summed(self, leaf: Callable[[int], list[T]], add: Callable[[T, T], T], owners: Sequence[int]) -> list[T | None]:
        """Several sums over all leaves at once, each at the process that owns it, None elsewhere. `leaf(number)` gives the
        terms of a leaf that is held here; an error in it is one of all."""

        def both(left: list[T], right: list[T]) -> list[T]:
            for item, term in enumerate(right):
                left[item] = add(left[item], term)
            right.clear()
            return left

        parts: dict[range, dict[int, T]] = {}
        with self.ranks.together():
            for span in self._spans:
                parts[span] = dict(enumerate(fold(span, leaf, both)))
        return [self._at_owner(item, owner, parts, add) for item, owner in enumerate(owners)]

    def summed_for_all(self, leaf: Callable[[int], list[T]], add: Callable[[T, T], T], sizes: Sequence[int]) -> list[T]:
        """The same at all processes; who adds up what goes by the sizes of the sums."""
        owners = self.ranks.assigned(sizes)
        found = self.summed(leaf, add, owners)
        return [self.ranks.broadcast(value, owner) for value, owner in zip(found, owners, strict=True)]

    @cached_property
    def _spans(self) -> list[range]:
        """The parts of the tree that can be summed up here."""
        mine = self._leaves_at(self.ranks.rank)
        return subtrees(range(len(self.leaves)), mine) if mine else []

    def _numbers_at(self, rank: int) -> range:
        leaves = self._leaves_at(rank)
        return range(self.leaves[leaves.start].start, self.leaves[leaves.stop - 1].stop) if leaves else range(0)

    def _leaves_at(self, rank: int) -> range:
        return leaves_at(rank, self.ranks.size, len(self.leaves))

    def _holder(self, span: range) -> int | None:
        """The one process that has all leaves of a part of the tree."""
        for rank in range(self.ranks.size):
            held = self._leaves_at(rank)
            if held.start <= span.start and span.stop <= held.stop:
                return rank
        return None

    def _at_owner(
        self, item: int, owner: int, parts: Mapping[range, dict[int, T]], add: Callable[[T, T], T]
    ) -> T | None:
        from llmsparse.ranks.messages import receive, send

        if owner != self.ranks.rank:
            for part in parts.values():
                send(part.pop(item), owner)
            return None

        def whole(span: range) -> T:
            holder = self._holder(span)
            if holder is None:
                left, right = halves(span)
                return add(whole(left), whole(right))
            if holder != owner:
                return receive(holder)
            return parts[span].pop(item)

        return whole(range(len(self.leaves)))
