"""Experts in memory: what runs is read first, a failure is told to all who wait, and only to those."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from llmsparse.backends.cpu.pages import Arena
from llmsparse.errors import CheckpointError
from llmsparse.inference.expert_memory import ExpertMemory
from llmsparse.inference.expert_readers import Key, ThreadReaders


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
