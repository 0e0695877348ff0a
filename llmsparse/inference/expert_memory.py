"""A bounded part of a mixture's experts in memory: the ones used last, and the ones that the next layers will want.

Threads read what is asked for, first for the layer that runs, then what is foreseen, while other experts are multiplied.
What was used longest ago makes room; what the running layer still needs does not, nor does what is foreseen unless for the
running layer. An expert that comes late is waited for, so what is computed does not depend on what was foreseen.
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

Key = tuple[int, int]  # number of the layer, number of the expert
Prepare = Callable[[Key, Arena, Any], Any]  # what it returns lies in the arena; the last is the thread's own


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
    """Experts in `arenas`, filled by one thread for each of `beside`, what it needs to do so."""

    def __init__(
        self,
        prepare: Prepare,
        arenas: Sequence[Arena],
        beside: Sequence[Any],
        size: Callable[[Key], int],
        ended: Callable[[], None],
    ) -> None:
        """`size`: bytes of an expert on disk. `ended` is called once nothing is read any more, after `close`."""
        self.tally = Tally()
        self.room = len(arenas)  # experts
        self._prepare, self._size, self._ended = prepare, size, ended
        self._readers = len(beside)
        self._free = list(arenas)
        self._held: OrderedDict[Key, tuple[Arena, Any]] = OrderedDict()  # used longest ago first
        self._reading: set[Key] = set()
        self._wanted: deque[Key] = deque()
        self._foreseen: list[Key] = []
        self._ahead: set[Key] = set()  # read because they were foreseen, and not used yet
        self._needed: Counter[Key] = Counter()
        self._failed: dict[Key, Exception] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read, args=(own,), daemon=True, name="experts") for own in beside
        ]
        for thread in self._threads:
            thread.start()
        _ALL.add(self)

    def arriving(
        self, layer: int, experts: Iterable[int], ahead: Callable[[], Sequence[Key]] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Each of the experts of a layer with what was prepared for it, as they come. It stays as it is until the next is
        asked for. Raises what reading raised.

        `ahead` tells what to `foresee`; it is asked while the experts are on their way."""
        pending = [(layer, expert) for expert in experts]
        with self._changed:
            self._ask(pending)
        try:
            if ahead is not None:
                self.foresee(ahead())
            while pending:
                with self._changed:
                    key = self._next(pending)
                    self._held.move_to_end(key)
                    held = self._held[key][1]
                yield key[1], held
                with self._changed:
                    pending.remove(key)
                    self._release(key)
        finally:
            with self._changed:
                for key in pending:
                    self._release(key)

    def foresee(self, keys: Sequence[Key]) -> None:
        """Read these while there is nothing to read for a layer that runs; the first come first. Takes the place of what was
        foreseen before."""
        with self._changed:
            self._foreseen = list(keys[: self.room // 2])
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing is read any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def end(self) -> None:
        """Close, and wait until nobody reads."""
        self.close()
        for thread in self._threads:
            thread.join()

    def _ask(self, keys: Sequence[Key]) -> None:
        for key in keys:
            if key not in self._needed:
                self._failed.pop(key, None)  # of another time
            self._needed[key] += 1
            self.tally.asked += 1
            self.tally.found += key in self._held
            self.tally.foreseen += key in self._ahead
            self._ahead.discard(key)
            if key not in self._held and key not in self._reading:
                self._wanted.append(key)
        self._changed.notify_all()

    def _next(self, pending: Sequence[Key]) -> Key:
        """One of them that is there, or will be first."""
        started = time.perf_counter()
        while True:
            for key in pending:
                if key in self._held:
                    self.tally.waited_seconds += time.perf_counter() - started
                    return key
                if key in self._failed:
                    raise self._failed[key]
            self._changed.wait()

    def _release(self, key: Key) -> None:
        self._needed[key] -= 1
        if self._needed[key] <= 0:
            del self._needed[key]
        self._changed.notify_all()

    def _read(self, own: Any) -> None:
        while (job := self._job()) is not None:
            key, arena = job
            try:
                made = self._prepare(key, arena, own)
            except Exception as error:  # whoever waits for it is told
                with self._changed:
                    self._failed[key] = error
                    self._free.append(arena)
                    self._done(key)
            else:
                with self._changed:
                    self._held[key] = (arena, made)
                    self.tally.read += 1
                    self.tally.read_bytes += self._size(key)
                    self._done(key)
                del made
        with self._changed:
            self._readers -= 1
            if not self._readers:
                self._ended()

    def _done(self, key: Key) -> None:
        self._reading.discard(key)
        self._changed.notify_all()

    def _job(self) -> tuple[Key, Arena] | None:
        """What to read next, and where to; None once it is closed."""
        with self._changed:
            while not self._closed:
                found = self._job_now()
                if found is not None:
                    self._reading.add(found[0])
                    return found
                self._changed.wait()
        return None

    def _job_now(self) -> tuple[Key, Arena] | None:
        while self._wanted:
            key = self._wanted[0]
            if key in self._held or key in self._reading or key not in self._needed:
                self._wanted.popleft()
                continue
            arena = self._vacate(self._foreseen) or self._vacate(())
            if arena is None:
                return None  # one comes free when a layer is done with an expert
            self._wanted.popleft()
            return key, arena
        for key in self._foreseen:
            if key not in self._held and key not in self._reading and key not in self._failed:
                arena = self._vacate(self._foreseen)
                if arena is None:
                    return None
                self._ahead.add(key)
                self.tally.read_ahead += 1
                return key, arena
        return None

    def _vacate(self, spared: Sequence[Key]) -> Arena | None:
        if self._free:
            return self._free.pop()
        for key in self._held:
            if key not in self._needed and key not in spared:
                self._ahead.discard(key)
                return self._held.pop(key)[0]
        return None
