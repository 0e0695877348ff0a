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
from collections.abc import Generator
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
        self._opened = threading.RLock()  # a finalizer that closes it may run in the thread that has it
        self._number: int | None = None
        self._direct = hasattr(os, "O_DIRECT")
        self._left: list[int] = []  # others may still be reading by it
        self._users, self._closed = 0, False

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
            if not direct and first < last and hasattr(os, "posix_fadvise"):  # no bytes would mean all that follow
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
        """For good: at once, or when nobody has it in use any more."""
        with self._opened:
            self._closed = True
            self._close_unused()

    @contextlib.contextmanager
    def used(self) -> Generator[None]:
        """Within it what the file is read by stays open. CheckpointError where it is closed."""
        with self._opened:
            self._refuse_closed()
            self._users += 1
        try:
            yield
        finally:
            with self._opened:
                self._users -= 1
                self._close_unused()

    def descriptor(self) -> tuple[int, bool]:
        """What the file is read by, and whether past the page cache. CheckpointError where it cannot be opened, or is closed."""
        with self._opened:
            self._refuse_closed()
            if self._number is None:
                if self._direct:
                    with contextlib.suppress(OSError):
                        self._number = os.open(self.file, os.O_RDONLY | os.O_DIRECT)
                if self._number is None:
                    try:
                        self._number, self._direct = os.open(self.file, os.O_RDONLY), False
                    except OSError as error:
                        raise CheckpointError(f"{self.file}: cannot be opened ({error.strerror})") from error
            return self._number, self._direct

    def _refuse_closed(self) -> None:
        if self._closed:
            raise CheckpointError(f"{self.file}: is not read any more; load the model again")

    def _close_unused(self) -> None:
        if self._closed and not self._users:
            for number in (*self._left, *([] if self._number is None else [self._number])):
                os.close(number)
            self._number, self._left = None, []

    def _reopened(self) -> tuple[int, bool]:
        with self._opened:
            if self._direct and self._number is not None:
                number = os.open(self.file, os.O_RDONLY)
                self._left.append(self._number)
                self._direct, self._number = False, number
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
