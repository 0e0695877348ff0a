"""Reads that leave no trace: from the disk into the caller's memory, past the page cache where the file system lets us.

Who reads more than fits into memory, over and over, gains nothing by the system's copies of it, and pays for them: on one
core the copying costs a third of a fast disk's speed, and pages of others are given up for them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from pathlib import Path

from llmsparse.errors import CheckpointError

BLOCK = 4096  # where reads past the page cache begin and end


def room_for(size: int) -> int:
    """Bytes of memory that `read` may fill for `size` bytes of a file."""
    return -(-size // BLOCK) * BLOCK + BLOCK


class DirectFile:
    """A file that is read in pieces, by any number of threads at once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._opened = threading.Lock()
        self._number: int | None = None
        self._direct = hasattr(os, "O_DIRECT")

    def read(self, begin: int, end: int, memory: mmap.mmap, at: int) -> int:
        """Bytes [begin, end) of the file into `memory`, somewhere between `at`, a multiple of BLOCK, and `at` +
        `room_for(end - begin)`; where they begin. CheckpointError where they cannot be read."""
        first = begin // BLOCK * BLOCK
        last = -(-end // BLOCK) * BLOCK
        try:
            number = self._descriptor()
            try:
                got = _fill(number, memory, at, first, last, end)
            except OSError:
                if not self._direct:
                    raise
                self._reopen()  # a file system that opens files so and will not read them
                got = _fill(self._descriptor(), memory, at, first, last, end)
            if not self._direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor(), first, last - first, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read ({error.strerror})") from error
        if got < end:
            raise CheckpointError(f"{self.file}: became shorter while it was read")
        return at + begin - first

    def close(self) -> None:
        with self._opened:
            if self._number is not None:
                os.close(self._number)
                self._number = None

    def _descriptor(self) -> int:
        with self._opened:
            if self._number is None:
                if self._direct:
                    with contextlib.suppress(OSError):
                        self._number = os.open(self.file, os.O_RDONLY | os.O_DIRECT)
                if self._number is None:
                    self._direct = False
                    self._number = os.open(self.file, os.O_RDONLY)
            return self._number

    def _reopen(self) -> None:
        with self._opened:
            if self._direct and self._number is not None:  # it stays open: other threads may be reading
                self._direct, self._number = False, os.open(self.file, os.O_RDONLY)


def _fill(number: int, memory: mmap.mmap, at: int, first: int, last: int, end: int) -> int:
    """Read [first, last) of a file to `at`; how far in the file that came, `end` or more unless the file ends before."""
    view, place = memoryview(memory), first
    while place < end:
        got = os.preadv(number, [view[at + place - first : at + last - first]], place)
        if got == 0:
            break
        place += got
    return place
