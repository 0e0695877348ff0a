"""The processes of a run, as each of them sees the others.

A process alone is a group of one: the same calls, and nothing is sent. In a group, every call here is made by all processes
in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from llmsparse.errors import LlmsparseError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Ranks:
    """`rank` of `size` processes, `local_size` of them on this machine."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def known(self, make: Callable[[], T]) -> T:
        """What the first process makes, at all of them; an error that it ends in, too."""
        made: Any = None
        with self.together():
            if self.first:
                made = make()
        return self.broadcast(made, 0)

    def broadcast(self, value: T | None, source: int) -> T:
        """The value of process `source`, at all of them; what others give is not looked at."""
        found: Any = value
        if self.size == 1:
            return found
        from llmsparse.ranks.messages import broadcast

        return broadcast(found, source)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, at all of them."""
        return [self.broadcast(value, source) for source in range(self.size)]

    @contextmanager
    def together(self) -> Generator[None]:
        """An error in one process becomes an error of all, each raising it as it leaves: that of the lowest rank. For what
        each process does by itself: no call of the group within."""
        found: LlmsparseError | None = None
        try:
            yield
        except LlmsparseError as error:
            if self.size == 1:
                raise
            found = error
        if self.size == 1:
            return
        said = self.gather((type(found), str(found)) if found else None)
        for rank, one in enumerate(said):
            if one is not None:
                kind, text = one
                error = kind.__new__(kind, f"rank {rank}: {text}" if rank else text)
                error.common = True
                raise error from found

    def each(self, items: Generator[T]) -> Generator[T]:
        """Items that every process makes by itself, all the same; an error in making one is an error of all."""
        with closing(items):
            while True:
                made: list[T] = []
                with self.together():
                    made.extend(islice(items, 1))
                if not made:
                    return
                yield made.pop()

    def assigned(self, costs: Sequence[float]) -> list[int]:
        """For each of several pieces of work the process that does it: the costliest first, to whoever has least."""
        load, owners = [0.0] * self.size, [0] * len(costs)
        for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
            owners[item] = load.index(min(load))
            load[owners[item]] += costs[item]
        return owners

    def divided(self, items: Sequence[T], owners: Sequence[int], work: Callable[[T], R]) -> Iterator[R]:
        """What comes of each item, in order, at all processes; worked on by its owner alone."""
        if self.size == 1:
            yield from map(work, items)
            return
        made: dict[int, R] = {}
        with self.together():
            for number, (item, owner) in enumerate(zip(items, owners, strict=True)):
                if owner == self.rank:
                    made[number] = work(item)
        for number, owner in enumerate(owners):
            yield self.broadcast(made.pop(number, None), owner)


ALONE = Ranks()
