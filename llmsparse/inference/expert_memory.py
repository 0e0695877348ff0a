"""A bounded part of a mixture's experts in memory: the ones used last, and the ones that the next layers will want.

They are read while others are multiplied, first what the layer that runs asks for, then what is foreseen. What was used longest
ago makes room; what the running layer still needs does not, nor does what is foreseen unless for the running layer. An
expert that comes late is waited for, so what is computed does not depend on what was foreseen.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmsparse.backends.cpu.pages import Arena
from llmsparse.errors import RecipeError
from llmsparse.inference.expert_readers import ExpertReaders, Key, Unread


@dataclass
class Tally:
    """What has become of the experts that layers asked for."""

    asked: int = 0
    found: int = 0  # in memory when they were asked for
    foreseen: int = 0  # of those asked for: read ahead, or on their way
    read: int = 0
    read_ahead: int = 0  # reads that were begun because an expert was foreseen, and came to an end
    repeated: int = 0  # reads in which C failed
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
        self._reading: dict[Key, Arena] = {}  # submitted to readers, and what is to be read again
        self._again: set[Key] = set()  # of those: whoever waits for it reads it
        self._wanted: deque[Key] = deque()
        self._foreseen: list[Key] = []
        self._early: set[Key] = set()  # of those being read: because they were foreseen
        self._ahead: set[Key] = set()  # read or being read because they were foreseen, and not used yet
        self._needed: Counter[Key] = Counter()
        self._failed: dict[Key, Exception] = {}
        self._closed = False
        self._process = os.getpid()  # a fork of it has no threads that read
        self._lock = threading.RLock()  # a finalizer that closes may run in the thread that has it
        _ALL.add(self)

    def arriving(
        self, layer: int, experts: Iterable[int], ahead: Callable[[], Sequence[Key]] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Each of the experts of a layer with what was prepared for it, as they come. It stays as it is until the next is
        asked for. Raises what reading raised.

        `ahead` tells what to `foresee`; it is asked while the experts are on their way."""
        self._refuse_closed()
        asked: list[Key] = []
        try:
            with self._lock:
                self._ask([(layer, expert) for expert in experts], asked)
            if ahead is not None:
                self.foresee(ahead())
            while asked:
                key, held = self._next(asked)
                yield key[1], held
                with self._lock:
                    asked.remove(key)
                    self._release([key])
        finally:
            with self._lock:
                self._release(asked)

    def foresee(self, keys: Sequence[Key]) -> None:
        """Read these while there is nothing to read for a layer that runs; the first come first. Takes the place of what was
        foreseen before."""
        self._refuse_closed()
        with self._lock:
            self._collect()
            self._foreseen = list(keys[: self.room // 2])
            for key in self._early.difference(self._foreseen, self._needed):
                self._recall(key)
            self._submit()

    def close(self) -> None:
        """Nothing is read any more. In a fork of the process, nothing is done: who reads is not there."""
        if os.getpid() == self._process:
            self._closed = True
            self._readers.close()

    def end(self) -> None:
        """Close, and wait until nobody reads."""
        if os.getpid() == self._process:
            self.close()
            self._readers.end()

    def _refuse_closed(self) -> None:
        if os.getpid() != self._process:
            raise RecipeError(
                "experts of this model are read by another process: load the model in this one, after the fork"
            )
        if self._closed:
            raise RecipeError("experts of this model are no longer read: it has been made dense, or let go")

    def _ask(self, keys: Sequence[Key], asked: list[Key]) -> None:
        """`asked`: those that are needed from now on."""
        self._collect()
        for key in keys:
            if key not in self._needed:
                self._failed.pop(key, None)  # of another time
            self._needed[key] += 1
            asked.append(key)
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
                self._refuse_closed()
                seen = self._readers.finished()
                self._collect()
                for key in pending:
                    if key in self._held:
                        self._held.move_to_end(key)
                        self.tally.waited_seconds += time.perf_counter() - started
                        return key, self._held[key][1]
                    if key in self._failed:
                        raise self._failed[key]
                again = next((key for key in pending if key in self._again), None)
                if again is not None:
                    self._again.remove(again)
            if again is None:
                self._readers.wait(seen)
            else:
                self._repeat(again, self._reading[again])

    def _repeat(self, key: Key, arena: Arena) -> None:
        """Read what C could not, while others need not wait."""
        try:
            made = self._readers.now(key, arena)
        except Exception as error:  # whoever waits for it is told
            made = error
        except BaseException:
            with self._lock:
                self._again.add(key)
            raise
        with self._lock:
            self._note(key, made)
            self._submit()

    def _release(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._needed[key] -= 1
            if self._needed[key] <= 0:
                del self._needed[key]
                if key in self._again:
                    self._again.remove(key)
                    self._free.append(self._reading.pop(key))
        self._submit()

    def _collect(self) -> None:
        """Take over what has been read."""
        done = self._readers.done()
        for key, made in done:
            if key in self._reading and key not in self._again:  # else this was interrupted when it had noted it
                self.tally.read_ahead += key in self._early
                self._early.discard(key)
                self.tally.repeated += isinstance(made, Unread)
                if isinstance(made, Unread) and key in self._needed:
                    self._again.add(key)
                else:
                    self._note(key, made)
            self._readers.taken(key)
        if done:
            self._submit()

    def _note(self, key: Key, made: Any) -> None:
        """What has become of one that was being read."""
        if isinstance(made, Exception):
            self._failed[key] = made
            self._ahead.discard(key)
            self._free.append(self._reading.pop(key))
        else:
            self._held[key] = self._reading[key], made
            del self._reading[key]
            self.tally.read += 1
            self.tally.read_bytes += self._size(key)

    def _submit(self) -> None:
        """Have read what there is room for."""
        if self._closed or os.getpid() != self._process:
            return
        while self._wanted:
            key = self._wanted[0]
            if key not in self._held and key not in self._reading and key in self._needed:
                arena = self._vacate(self._foreseen) or self._vacate(()) or self._recalled()
                if arena is None:
                    return  # one comes free when a layer is done with an expert
                self._begin(key, arena, False)
            self._wanted.popleft()
        for key in self._foreseen:
            if key not in self._held and key not in self._reading and key not in self._failed:
                arena = self._vacate(self._foreseen)
                if arena is None:
                    return
                self._early.add(key)
                self._ahead.add(key)
                self._begin(key, arena, True)

    def _begin(self, key: Key, arena: Arena, ahead: bool) -> None:
        self._reading[key] = arena
        try:
            self._readers.submit(key, arena, ahead)
        except BaseException as error:
            if self._recall(key) and isinstance(error, Exception):
                self._failed[key] = error  # who waits for it is told
                return
            raise

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
        self._free.append(self._reading.pop(key))
        self._early.discard(key)
        self._ahead.discard(key)
        return True
