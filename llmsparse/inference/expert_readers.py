"""Who reads experts: threads of C where C can, else threads of Python. What is wanted now is read before what is read ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmsparse.backends.cpu.pages import Arena
from llmsparse.backends.cpu.stored import Loading, Readers
from llmsparse.errors import MachineError
from llmsparse.inference.stored_experts import StoredExperts

Key = tuple[int, int]  # number of the layer, number of the expert
Prepare = Callable[[Key, Arena, Any], Any]  # what it returns lies in the arena; the last is the thread's own
SOON = 0.2  # seconds after which who waits looks whether there is anything to wait for


class Unread(Exception):
    """Threads of C could not read an expert: `now` can, or says what is wrong."""


class ExpertReaders(Protocol):
    """Only `wait`, `now`, `close` and `end` take time."""

    def submit(self, key: Key, arena: Arena, ahead: bool) -> None:
        """Of one that is not under way. Where this raises, `recall` says whether it is."""
        ...

    def hurry(self, key: Key) -> None:
        """What was to be read ahead is wanted now."""
        ...

    def recall(self, key: Key) -> bool:
        """Whether it was not begun, and will not be."""
        ...

    def done(self) -> list[tuple[Key, Any]]:
        """What has been finished and not `taken`: what was prepared, or the error. Nothing once it is closed."""
        ...

    def taken(self, key: Key) -> None: ...

    def finished(self) -> int:
        """How many are, ever."""
        ...

    def wait(self, seen: int) -> None:
        """Until more than `seen` are finished, or it is closed; not for long."""
        ...

    def now(self, key: Key, arena: Arena) -> Any:
        """Read by whoever calls."""
        ...

    def close(self) -> None:
        """Nothing is begun any more."""
        ...

    def end(self) -> None:
        """Close, and wait until nobody reads."""
        ...


@dataclass(eq=False)
class _Job:
    arena: Arena
    ahead: bool
    begun: bool = False
    finished: bool = False
    made: Any = None


class ThreadReaders:
    """Threads of Python, one for each of `beside`, what it needs to prepare an expert."""

    def __init__(self, prepare: Prepare, beside: Sequence[Any], own: Any, ended: Callable[[], None]) -> None:
        """`own` is that of whoever calls `now`; `ended` is called once nothing is read any more. MachineError."""
        self._prepare, self._own, self._ended = prepare, own, ended
        self._jobs: dict[Key, _Job] = {}
        self._finished, self._closed, self._reading = 0, False, len(beside)
        self._changed, self._one = threading.Condition(), threading.Lock()
        self._threads = [
            threading.Thread(target=self._read, args=(each,), daemon=True, name="experts") for each in beside
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            with self._changed:
                self._reading -= sum(thread.ident is None for thread in self._threads)
                self._closed = True
                self._changed.notify_all()
            raise MachineError(
                f"experts on disk: {error} to read them; allow this user more threads (ulimit -u)"
            ) from None

    def submit(self, key: Key, arena: Arena, ahead: bool) -> None:
        with self._changed:
            self._jobs[key] = _Job(arena, ahead)
            self._changed.notify_all()

    def hurry(self, key: Key) -> None:
        with self._changed:
            if key in self._jobs:
                self._jobs[key].ahead = False

    def recall(self, key: Key) -> bool:
        with self._changed:
            if key in self._jobs and self._jobs[key].begun:
                return False
            self._jobs.pop(key, None)
            return True

    def done(self) -> list[tuple[Key, Any]]:
        with self._changed:
            return [] if self._closed else [(key, job.made) for key, job in self._jobs.items() if job.finished]

    def taken(self, key: Key) -> None:
        with self._changed:
            self._jobs.pop(key, None)

    def finished(self) -> int:
        return self._finished

    def wait(self, seen: int) -> None:
        with self._changed:
            if self._finished <= seen and not self._closed:
                self._changed.wait(SOON)

    def now(self, key: Key, arena: Arena) -> Any:
        with self._one:
            return self._prepare(key, arena, self._own)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def end(self) -> None:
        self.close()
        for thread in self._threads:
            thread.join()

    def _read(self, own: Any) -> None:
        while (found := self._next()) is not None:
            key, job = found
            try:
                made = self._prepare(key, job.arena, own)
            except Exception as error:  # whoever waits for it is told
                made = error
            with self._changed:
                job.made, job.finished = made, True
                self._finished += 1
                self._changed.notify_all()
            del made, found, job
        with self._changed:
            self._reading -= 1
            if not self._reading:
                self._ended()

    def _next(self) -> tuple[Key, _Job] | None:
        with self._changed:
            while not self._closed:
                waiting = [(key, job) for key, job in self._jobs.items() if not job.begun]
                if waiting:
                    key, job = next((one for one in waiting if not one[1].ahead), waiting[0])
                    job.begun = True
                    return key, job
                self._changed.wait()
        return None


class NativeReaders:
    """Threads of C, one for each scratch: they do not hold up who multiplies meanwhile."""

    def __init__(
        self, layers: Sequence[StoredExperts], scratches: Sequence[Arena], own: Arena, ended: Callable[[], None]
    ) -> None:
        """`own` is what whoever calls `now` reads into; `ended` is called once nothing is read any more. MachineError."""
        self._layers, self._own, self._ended = layers, own, ended
        rows = max(stack.shape[0] for layer in layers for stack in layer.stacks.values())
        self._readers = Readers(scratches, rows)
        self._under_way: dict[Key, Loading] = {}
        self._taken, self._open = 0, True
        self._one, self._ending = threading.Lock(), threading.RLock()

    def submit(self, key: Key, arena: Arena, ahead: bool) -> None:
        loading = Loading(self._layers[key[0]].lying(key[1]), arena)
        self._under_way[key] = loading
        self._readers.submit(loading, ahead)

    def hurry(self, key: Key) -> None:
        if key in self._under_way:
            self._readers.hurry(self._under_way[key])

    def recall(self, key: Key) -> bool:
        loading = self._under_way.get(key)
        if loading is not None and loading.submitted and not self._readers.recall(loading):
            return False
        self._under_way.pop(key, None)
        return True

    def done(self) -> list[tuple[Key, Any]]:
        if not self._open or self._readers.finished() == self._taken:
            return []
        return [(key, self._result(key, one)) for key, one in self._under_way.items() if one.finished]

    def taken(self, key: Key) -> None:
        if self._under_way.pop(key, None) is not None:
            self._taken += 1

    def finished(self) -> int:
        return self._readers.finished()

    def wait(self, seen: int) -> None:
        self._readers.wait(seen)

    def now(self, key: Key, arena: Arena) -> Any:
        with self._one:
            return self._layers[key[0]].prepare(key[1], arena, self._own)

    def close(self) -> None:
        self.end()  # C does not keep what it reads into

    def end(self) -> None:
        with self._ending:
            if self._open:
                self._open = False
                self._readers.close()
                self._readers.join()
                self._ended()

    def _result(self, key: Key, loading: Loading) -> Any:
        return Unread() if loading.failed else self._layers[key[0]].ready(loading)
