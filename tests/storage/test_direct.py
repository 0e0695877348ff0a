"""Reads past the page cache: any bytes of a file, by several threads, and a short file in one line."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmsparse.errors import CheckpointError
from llmsparse.storage.direct import DirectFile, room_for
from llmsparse.storage.disk import parse_size, spell_least

SIZE = 50_001


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "bytes").write_bytes(bytes(number % 251 for number in range(SIZE)))
    return tmp_path / "bytes"


def test_any_bytes_are_those_of_the_file_whoever_else_reads(file: Path) -> None:
    direct, whole = DirectFile(file), file.read_bytes()
    spans = [(begin, min(SIZE, begin + length)) for begin in range(0, SIZE, 4001) for length in (1, 4096, 9999)]

    def read(span: tuple[int, int]) -> bool:
        begin, end = span
        memory = mmap.mmap(-1, 4096 + room_for(end - begin))
        at = direct.read(begin, end, memory, 4096)
        return memory[at : at + end - begin] == whole[begin:end]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, spans))
    direct.close()


def test_where_the_system_will_not_read_directly_it_is_read_all_the_same(file: Path) -> None:
    """A place in memory that is no multiple of a sector is refused past the page cache, and read otherwise."""
    direct, memory = DirectFile(file), mmap.mmap(-1, 16384)
    at = direct.read(10, 20, memory, 4096 + 8)
    assert memory[at : at + 10] == file.read_bytes()[10:20]
    at = direct.read(30, 40, memory, 4096)
    assert memory[at : at + 10] == file.read_bytes()[30:40]
    before = len(os.listdir("/proc/self/fd"))
    direct.close()
    assert len(os.listdir("/proc/self/fd")) < before


def test_a_file_that_became_shorter_is_one_line(file: Path) -> None:
    direct = DirectFile(file)
    os.truncate(file, 1000)
    with pytest.raises(
        CheckpointError, match="has 1000 bytes, 3000 or more when the model was loaded; put the whole file back"
    ):
        direct.read(2000, 3000, mmap.mmap(-1, 16384), 0)
    direct.close()


@pytest.mark.parametrize("size", [1, 999, 1000, 48_931, 999_501, 999_999, 1_000_001, 12_345_678_901])
def test_a_size_that_is_asked_for_is_enough(size: int) -> None:
    assert size <= parse_size(spell_least(size)) <= 1.011 * size
