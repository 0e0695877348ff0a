"""Files come into the page cache, unless they are too large for it."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from llmsparse.inference import read_ahead as module
from llmsparse.inference.read_ahead import read_ahead

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")), reason="Linux tells what is in its cache"
)


def cached(file: Path, place: int) -> bool:
    with file.open("rb") as opened:
        try:
            return os.preadv(opened.fileno(), [bytearray(1)], place, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                pytest.skip("this file system does not tell what is in the cache")
            raise


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(16 * 2**20))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(file, 15 * 2**20):  # asking may bring in what is around
        pytest.skip("this file system keeps everything in memory")
    return file


def test_a_cold_file_is_in_the_cache_before_anybody_reads_it(cold: Path) -> None:
    thread = read_ahead([cold])

    assert thread is not None
    thread.join()
    places = range(0, 16 * 2**20, 2**20)
    until = time.monotonic() + 30
    while not all(cached(cold, place) for place in places) and time.monotonic() < until:
        time.sleep(0.01)
    assert all(cached(cold, place) for place in places)


def test_files_that_would_fill_the_memory_are_left_alone(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda _: 31 * 2**20)

    assert read_ahead([cold]) is None
    assert not cached(cold, 5 * 2**20)


def test_a_missing_file_is_left_to_whoever_opens_it(tmp_path: Path) -> None:
    assert read_ahead([tmp_path / "gone.safetensors"]) is None
