"""Experts in memory: what runs is read first, a failure is told to all who wait, and only to those."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from llmsparse.backends.cpu.pages import Arena
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.inference.expert_memory import ExpertMemory
from llmsparse.inference.expert_readers import Key, ThreadReaders, Unread


class Reader:
    """Hands out the key itself, once it may."""

    def __init__(self) -> None:
        self.read: list[Key] = []
        self.broken: set[Key] = set()
        self.may = threading.Event()
        self.may.set()
        self.ended = threading.Event()

    def __call__(self, key: Key, arena: Arena, own: Any) -> Key:
        self.may.wait(10)
        self.read.append(key)
        if key in self.broken:
            raise CheckpointError(f"{key} is broken")
        return key


def memory_of(reader: Reader, room: int = 8, readers: int = 1) -> ExpertMemory:
    threads = ThreadReaders(reader, [None] * readers, None, reader.ended.set)
    return ExpertMemory(threads, Arena.row(room, 4096), lambda key: 1)


def test_what_the_running_layer_wants_is_asked_for_before_anybody_looks_ahead() -> None:
    reader = Reader()
    memory = memory_of(reader)
    found = list(memory.arriving(0, [3, 1], lambda: [(1, 0), (1, 1)]))
    assert found == [(3, (0, 3)), (1, (0, 1))]
    assert list(memory.arriving(1, [1])) == [(1, (1, 1))]
    assert reader.read[:2] == [(0, 3), (0, 1)] and set(reader.read[2:]) <= {(1, 0), (1, 1)}
    memory.close()
    assert reader.ended.wait(10)


def test_all_who_wait_for_what_cannot_be_read_are_told() -> None:
    reader, told = Reader(), list[str]()
    reader.broken.add((0, 0))
    reader.may.clear()
    memory = memory_of(reader)

    def ask() -> None:
        with pytest.raises(CheckpointError, match="is broken") as error:
            list(memory.arriving(0, [0]))
        told.append(str(error.value))

    asking = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in asking:
        thread.start()
    while memory.tally.asked < 3:
        time.sleep(0.01)
    reader.may.set()
    for thread in asking:
        thread.join(10)
    assert len(told) == 3
    memory.close()


def test_a_failure_of_another_time_is_forgotten_when_it_is_asked_for_again() -> None:
    reader = Reader()
    reader.broken.add((0, 0))
    memory = memory_of(reader)
    with pytest.raises(CheckpointError):
        list(memory.arriving(0, [0]))
    reader.broken.clear()
    assert list(memory.arriving(0, [0])) == [(0, (0, 0))]
    memory.close()


def test_what_was_interrupted_half_way_is_read_when_it_is_asked_for_again() -> None:
    """However far its bookkeeping had come."""
    reader = Reader()
    interrupted = ["size", "submit", "submitted", "taken"]

    def interrupt(place: str) -> None:
        if place in interrupted:
            interrupted.remove(place)
            raise KeyboardInterrupt

    class Interrupted(ThreadReaders):
        def submit(self, key: Key, arena: Arena, ahead: bool) -> None:
            interrupt("submit")
            super().submit(key, arena, ahead)
            interrupt("submitted")

        def taken(self, key: Key) -> None:
            interrupt("taken")
            super().taken(key)

    def size(key: Key) -> int:
        interrupt("size")
        return 1

    memory = ExpertMemory(Interrupted(reader, [None], None, reader.ended.set), Arena.row(2, 4096), size)
    for layer in range(2, 12):
        with contextlib.suppress(KeyboardInterrupt):
            within_seconds(lambda layer=layer: list(memory.arriving(layer, [0, 1])))
    assert not interrupted
    assert within_seconds(lambda: sorted(memory.arriving(0, [0, 1]))) == [(0, (0, 0)), (1, (0, 1))]
    assert within_seconds(lambda: list(memory.arriving(1, [0]))) == [(0, (1, 0))]
    memory.close()


def within_seconds(work: Callable[[], Any]) -> Any:
    """What it gives, unless it waits for ever."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert found, "it waits for ever"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def test_what_cannot_be_submitted_is_told_to_who_asks() -> None:
    class Refusing(ThreadReaders):
        def submit(self, key: Key, arena: Arena, ahead: bool) -> None:
            if key[0] == 1:
                raise CheckpointError(f"{key} is not there")
            super().submit(key, arena, ahead)

    reader = Reader()
    memory = ExpertMemory(Refusing(reader, [None], None, reader.ended.set), Arena.row(4, 4096), lambda key: 1)
    assert list(memory.arriving(0, [0], lambda: [(1, 0)])) == [(0, (0, 0))], "nobody has asked for it"
    for _ in range(6):  # more than there are arenas
        with pytest.raises(CheckpointError, match="is not there"):
            list(memory.arriving(1, [0]))
    memory.close()


def test_it_may_be_closed_by_who_is_in_the_middle_of_it() -> None:
    """As a finalizer may, wherever it runs."""
    reader = Reader()
    threads = ThreadReaders(reader, [None], None, reader.ended.set)

    def size(key: Key) -> int:
        memory.foresee([])
        memory.close()
        return 1

    memory = ExpertMemory(threads, Arena.row(4, 4096), size)
    assert within_seconds(lambda: list(memory.arriving(0, [0]))) == [(0, (0, 0))]
    with pytest.raises(RecipeError, match="no longer read"):
        next(memory.arriving(0, [0]))
    assert reader.ended.wait(10) and threads.done() == []


class Unable(ThreadReaders):
    """Its threads fail where those of C would; whoever asks can read."""

    asked: list[Key]

    def now(self, key: Key, arena: Arena) -> Any:
        self.asked.append(key)
        return super().now(key, arena)


def test_what_threads_cannot_read_is_read_by_who_asks_and_not_before() -> None:
    def prepare(key: Key, arena: Arena, own: Any) -> Key:
        if own == "thread":
            raise Unread
        return key

    readers = Unable(prepare, ["thread"], "caller", lambda: None)
    readers.asked = []
    memory = ExpertMemory(readers, Arena.row(4, 4096), lambda key: 1)
    memory.foresee([(0, 0), (0, 1)])
    within_seconds(lambda: wait_for_reads(memory, 2))
    assert readers.asked == [], "they are only foreseen"
    assert within_seconds(lambda: sorted(memory.arriving(0, [0, 1]))) == [(0, (0, 0)), (1, (0, 1))]
    assert sorted(readers.asked) == [(0, 0), (0, 1)] and memory.tally.read == 2
    memory.close()


def wait_for_reads(memory: ExpertMemory, count: int) -> bool:
    while memory.tally.repeated < count:
        memory.foresee([(0, 0), (0, 1)])
        time.sleep(0.01)
    return True
