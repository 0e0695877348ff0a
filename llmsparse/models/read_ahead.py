"""The next block is read from disk by a thread while the current one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from types import TracebackType
from typing import Self

from torch import Tensor

Tensors = dict[str, Tensor]


class ReadAhead:
    """`read(index)` for each of `order`, begun one ahead of who takes them, never more: one block waits in memory.

    What a read raises is raised by the `take` of that block. A context manager; leaving it waits for the read that is
    under way.
    """

    def __init__(self, read: Callable[[int], Tensors], order: Sequence[int]) -> None:
        self._read = read
        self._next = dict(pairwise(order))
        self._thread = ThreadPoolExecutor(1, "llmsparse-read-ahead")
        self._reading: dict[int, Future[Tensors]] = {}

    def take(self, index: int) -> Tensors:
        """The tensors of a block; the one after it is read from now on."""
        tensors = self._reading.pop(index).result() if index in self._reading else self._read(index)
        if index in self._next:
            following = self._next[index]
            self._reading[following] = self._thread.submit(self._read, following)
        return tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._reading.clear()
