"""A bounded part of a mixture's experts in memory: the ones used last, and the ones that the next layers will want.

They are read while others are multiplied, first what the layer that runs asks for, then what is foreseen. What was used longest
ago makes room; what the running layer still needs does not, nor does what is foreseen unless for the running layer. An
expert that comes late is waited for, so what is computed does not depend on what was foreseen.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmsparse.backends.cpu.pages import Arena
from llmsparse.errors import RecipeError
from llmsparse.inference.expert_readers import ExpertReaders, Key


@dataclass
class Tally:
    """What has become of the experts that layers asked for."""

    asked: int = 0
    found: int = 0  # in memory when they were asked for
    foreseen: int = 0  # of those asked for: read ahead, or on their way
    read: int = 0
    read_ahead: int = 0  # reads begun because an expert was foreseen
    read_bytes: int = 0
    waited_seconds: float = 0.0


_ALL: weakref.WeakSet[ExpertMemory] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Python aborts where it ends while a thread of it is within torch."""
    for memory in list(_ALL):
        memory.end()


class ExpertMemory:
    """Experts in `arenas`, filled by `readers`."""

    def __init__(self, readers: ExpertReaders, arenas: Sequence[Arena], size: Callable[[Key], int]) -> None:
        """`size`: bytes of an expert on disk."""
        self.tally = Tally()
        self.room = len(arenas)  # experts
        self._readers, self._size = readers, size
        self._free = list(arenas)
        self._held: OrderedDict[Key, tuple[Arena, Any]] = OrderedDict()  # used longest ago first
        self._reading: dict[Key, Arena] = {}  # submitted to readers
        self._wanted: deque[Key] = deque()
        self._foreseen: list[Key] = []
        self._early: set[Key] = set()  # of those being read: because they were foreseen
        self._ahead: set[Key] = set()  # read or being read because they were foreseen, and not used yet
        self._needed: Counter[Key] = Counter()
        self._failed: dict[Key, Exception] = {}
        self._closed = False
        self._lock = threading.Lock()
        _ALL.add(self)

    def arriving(
        self, layer: int, experts: Iterable[int], ahead: Callable[[], Sequence[Key]] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Each of the experts of a layer with what was prepared for it, as they come. It stays as it is until the next is
        asked for. Raises what reading raised.

        `ahead` tells what to `foresee`; it is asked while the experts are on their way."""
        pending = [(layer, expert) for expert in experts]
        with self._lock:
            self._ask(pending)
        try:
            if ahead is not None:
                self.foresee(ahead())
            while pending:
                key, held = self._next(pending)
                yield key[1], held
                with self._lock:
                    pending.remove(key)
                    self._release(key)
        finally:
            with self._lock:
                for key in pending:
                    self._release(key)

    def foresee(self, keys: Sequence[Key]) -> None:
        """Read these while there is nothing to read for a layer that runs; the first come first. Takes the place of what was
        foreseen before."""
        with self._lock:
            self._collect()
            self._foreseen = list(keys[: self.room // 2])
            for key in self._early.difference(self._foreseen, self._needed):
                self._recall(key)
            self._submit()

    def close(self) -> None:
        """Nothing is read any more."""
        with self._lock:
            self._closed = True
        self._readers.close()

    def end(self) -> None:
        """Close, and wait until nobody reads."""
        self.close()
        self._readers.end()

    def _ask(self, keys: Sequence[Key]) -> None:
        self._collect()
        for key in keys:
            if key not in self._needed:
                self._failed.pop(key, None)  # of another time
            self._needed[key] += 1
            self.tally.asked += 1
            self.tally.found += key in self._held
            self.tally.foreseen += key in self._ahead
            self._ahead.discard(key)
            if key in self._early:
                self._readers.hurry(key)
            if key not in self._held and key not in self._reading:
                self._wanted.append(key)
        self._submit()

    def _next(self, pending: Sequence[Key]) -> tuple[Key, Any]:
        """One of them that is there, or will be first."""
        started = time.perf_counter()
        while True:
            with self._lock:
                seen = self._readers.finished()
                self._collect()
                for key in pending:
                    if key in self._held:
                        self._held.move_to_end(key)
                        self.tally.waited_seconds += time.perf_counter() - started
                        return key, self._held[key][1]
                    if key in self._failed:
                        raise self._failed[key]
                if self._closed:
                    raise RecipeError("experts of this model are no longer read: it has been made dense, or let go")
            self._readers.wait(seen)

    def _release(self, key: Key) -> None:
        self._needed[key] -= 1
        if self._needed[key] <= 0:
            del self._needed[key]
            self._submit()

    def _collect(self) -> None:
        """Take over what has been read."""
        done = self._readers.done()
        for key, made in done:
            arena = self._reading.pop(key)
            self.tally.read_ahead += key in self._early
            self._early.discard(key)
            if isinstance(made, Exception):
                self._failed[key] = made
                self._ahead.discard(key)
                self._free.append(arena)
                continue
            self._held[key] = (arena, made)
            self.tally.read += 1
            self.tally.read_bytes += self._size(key)
        if done:
            self._submit()

    def _submit(self) -> None:
        """Have read what there is room for."""
        if self._closed:
            return
        while self._wanted:
            key = self._wanted[0]
            if key not in self._held and key not in self._reading and key in self._needed:
                arena = self._vacate(self._foreseen) or self._vacate(()) or self._recalled()
                if arena is None:
                    return  # one comes free when a layer is done with an expert
                self._reading[key] = arena
                self._readers.submit(key, arena, False)
            self._wanted.popleft()
        for key in self._foreseen:
            if key not in self._held and key not in self._reading and key not in self._failed:
                arena = self._vacate(self._foreseen)
                if arena is None:
                    return
                self._reading[key] = arena
                self._early.add(key)
                self._ahead.add(key)
                self._readers.submit(key, arena, True)

    def _vacate(self, spared: Sequence[Key]) -> Arena | None:
        if self._free:
            return self._free.pop()
        for key in self._held:
            if key not in self._needed and key not in spared:
                self._ahead.discard(key)
                return self._held.pop(key)[0]
        return None

    def _recalled(self) -> Arena | None:
        """Of one that was to be read ahead."""
        for key in self._early.difference(self._needed):
            if self._recall(key):
                return self._free.pop()
        return None

    def _recall(self, key: Key) -> bool:
        if not self._readers.recall(key):
            return False
        self._early.discard(key)
        self._ahead.discard(key)
        self._free.append(self._reading.pop(key))
        return True
