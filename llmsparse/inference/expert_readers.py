"""Who reads experts: threads of C where C can, else threads of Python. What is wanted now is read before what is read ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

from llmsparse.backends.cpu import pages
from llmsparse.backends.cpu.pages import Arena
from llmsparse.backends.cpu.stored import Loading, Readers
from llmsparse.inference.stored_experts import StoredExperts

Key = tuple[int, int]  # number of the layer, number of the expert
Prepare = Callable[[Key, Arena, Any], Any]  # what it returns lies in the arena; the last is the thread's own


class ExpertReaders(Protocol):
    """Only `wait`, `now` and `end` take time."""

    def submit(self, key: Key, arena: Arena, ahead: bool) -> None: ...

    def hurry(self, key: Key) -> None:
        """What was to be read ahead is wanted now."""
        ...

    def recall(self, key: Key) -> bool:
        """Whether it was not begun, and will not be."""
        ...

    def done(self) -> list[tuple[Key, Any]]:
        """What has been finished since the last time: what was prepared, or the error."""
        ...

    def finished(self) -> int:
        """How many are, ever."""
        ...

    def wait(self, seen: int) -> None:
        """Until more than `seen` are finished, or it is closed."""
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


class ThreadReaders:
    """Threads of Python, one for each of `beside`, what it needs to prepare an expert."""

    def __init__(self, prepare: Prepare, beside: Sequence[Any], ended: Callable[[], None]) -> None:
        """`ended` is called once nothing is read any more."""
        self._prepare, self._beside, self._ended = prepare, beside, ended
        self._wanted: list[tuple[Key, Arena]] = []
        self._ahead: list[tuple[Key, Arena]] = []
        self._done: list[tuple[Key, Any]] = []
        self._finished, self._closed, self._reading = 0, False, len(beside)
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read, args=(own,), daemon=True, name="experts") for own in beside
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: Key, arena: Arena, ahead: bool) -> None:
        with self._changed:
            (self._ahead if ahead else self._wanted).append((key, arena))
            self._changed.notify_all()

    def hurry(self, key: Key) -> None:
        with self._changed:
            for job in [job for job in self._ahead if job[0] == key]:
                self._ahead.remove(job)
                self._wanted.append(job)

    def recall(self, key: Key) -> bool:
        with self._changed:
            for jobs in (self._wanted, self._ahead):
                for job in [job for job in jobs if job[0] == key]:
                    jobs.remove(job)
                    return True
        return False

    def done(self) -> list[tuple[Key, Any]]:
        with self._changed:
            done, self._done = self._done, []
            return done

    def finished(self) -> int:
        return self._finished

    def wait(self, seen: int) -> None:
        with self._changed:
            while self._finished <= seen and not self._closed:
                self._changed.wait()

    def now(self, key: Key, arena: Arena) -> Any:
        return self._prepare(key, arena, self._beside[0])

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def end(self) -> None:
        self.close()
        for thread in self._threads:
            thread.join()

    def _read(self, own: Any) -> None:
        while (job := self._job()) is not None:
            key, arena = job
            try:
                made = self._prepare(key, arena, own)
            except Exception as error:  # whoever waits for it is told
                made = error
            with self._changed:
                self._done.append((key, made))
                self._finished += 1
                self._changed.notify_all()
            del made
        with self._changed:
            self._reading -= 1
            if not self._reading:
                self._ended()

    def _job(self) -> tuple[Key, Arena] | None:
        with self._changed:
            while not self._closed:
                jobs = self._wanted or self._ahead
                if jobs:
                    return jobs.pop(0)
                self._changed.wait()
        return None


class NativeReaders:
    """Threads of C, one for each scratch: they do not hold up who multiplies meanwhile."""

    def __init__(self, layers: Sequence[StoredExperts], scratches: Sequence[Arena], ended: Callable[[], None]) -> None:
        """`ended` is called once nothing is read any more."""
        self._layers, self._scratches, self._ended = layers, scratches, ended
        rows = max(stack.shape[0] for layer in layers for stack in layer.stacks.values())
        self._readers = Readers(scratches, rows)
        self._under_way: dict[Key, tuple[Arena, Loading]] = {}
        self._told, self._open = 0, True

    def submit(self, key: Key, arena: Arena, ahead: bool) -> None:
        loading = Loading(self._layers[key[0]].lying(key[1]), arena)
        self._under_way[key] = arena, loading
        self._readers.submit(loading, ahead)

    def hurry(self, key: Key) -> None:
        if key in self._under_way:
            self._readers.hurry(self._under_way[key][1])

    def recall(self, key: Key) -> bool:
        if not self._readers.recall(self._under_way[key][1]):
            return False
        del self._under_way[key]
        return True

    def done(self) -> list[tuple[Key, Any]]:
        finished = self._readers.finished()
        if finished == self._told:
            return []
        keys = [key for key, (_, loading) in self._under_way.items() if loading.finished]
        self._told += len(keys)
        return [(key, self._result(key, *self._under_way.pop(key))) for key in keys]

    def finished(self) -> int:
        return self._readers.finished()

    def wait(self, seen: int) -> None:
        self._readers.wait(seen)

    def now(self, key: Key, arena: Arena) -> Any:
        return self._layers[key[0]].prepare(key[1], arena, self._own)

    def close(self) -> None:
        self.end()  # C does not keep what it reads into

    def end(self) -> None:
        if self._open:
            self._open = False
            self._readers.close()
            self._readers.join()
            self._ended()

    def _result(self, key: Key, arena: Arena, loading: Loading) -> Any:
        if not loading.failed:
            return self._layers[key[0]].ready(loading)
        try:
            return self.now(key, arena)
        except Exception as error:  # whoever waits for it is told
            return error

    @cached_property
    def _own(self) -> Arena:
        """Memory of whoever calls, which others do not read into."""
        return pages.Arena.row(1, self._scratches[0].size)[0]
