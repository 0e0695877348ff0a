"""Reads that leave no trace: from the disk into the caller's memory, past the page cache where the file system lets us.

Who reads more than fits into memory, over and over, gains nothing by the system's copies of it, and pays for them: on one
core the copying costs a third of a fast disk's speed, and pages of others are given up for them.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from pathlib import Path
from typing import ClassVar

from llmsparse.errors import CheckpointError

BLOCK = 4096  # where reads past the page cache begin and end


def room_for(size: int) -> int:
    """Bytes of memory that `read` may fill for `size` bytes of a file."""
    return -(-size // BLOCK) * BLOCK + BLOCK


class DirectFile:
    """A file that is read in pieces, by any number of threads at once."""

    by_number: ClassVar[bool] = True  # `read` does no more than C could by `descriptor`

    def __init__(self, file: Path) -> None:
        self.file = file
        self._opened = threading.Lock()
        self._number: int | None = None
        self._direct = hasattr(os, "O_DIRECT")
        self._left: list[int] = []  # others may still be reading by it

    def read(self, begin: int, end: int, memory: mmap.mmap, at: int) -> int:
        """Bytes [begin, end) of the file into `memory`, somewhere between `at`, a multiple of BLOCK, and `at` +
        `room_for(end - begin)`; where they begin. CheckpointError where they cannot be read."""
        first = begin // BLOCK * BLOCK
        last = -(-end // BLOCK) * BLOCK
        try:
            number, direct = self.descriptor()
            try:
                got = _fill(number, memory, at, first, last, end)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                number, direct = self._reopened()  # a file system that opens files so and will not read them
                got = _fill(number, memory, at, first, last, end)
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(number, first, last - first, os.POSIX_FADV_DONTNEED)
            size = os.fstat(number).st_size
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read ({error.strerror})") from error
        if got < end:
            raise CheckpointError(
                f"{self.file}: has {size} bytes, {end} or more when the model was loaded; put the whole file back, and load the model again"
            )
        return at + begin - first

    def close(self) -> None:
        """Once nobody reads any more."""
        with self._opened:
            for number in (*self._left, *([] if self._number is None else [self._number])):
                os.close(number)
            self._number, self._left = None, []

    def descriptor(self) -> tuple[int, bool]:
        """What the file is read by, and whether past the page cache. OSError where it cannot be opened."""
        with self._opened:
            if self._number is None:
                if self._direct:
                    with contextlib.suppress(OSError):
                        self._number = os.open(self.file, os.O_RDONLY | os.O_DIRECT)
                if self._number is None:
                    self._direct = False
                    self._number = os.open(self.file, os.O_RDONLY)
            return self._number, self._direct

    def _reopened(self) -> tuple[int, bool]:
        with self._opened:
            if self._direct and self._number is not None:
                self._left.append(self._number)
                self._direct, self._number = False, os.open(self.file, os.O_RDONLY)
        return self.descriptor()


def _fill(number: int, memory: mmap.mmap, at: int, first: int, last: int, end: int) -> int:
    """Read [first, last) of a file to `at`; how far in the file that came, `end` or more unless the file ends before."""
    view, place = memoryview(memory), first
    while place < end:
        got = os.preadv(number, [view[at + place - first : at + last - first]], place)
        if got == 0:
            break
        place += got
    return place
