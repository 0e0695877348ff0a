"""Bitmask-packed matrices out of files into the order of the CPU kernels, by threads of C: read, checked, repacked.

Not by threads of Python: torch gives up the interpreter's lock and asks for it again in every call, so two threads that call
it by turns wait for each other most of the time.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.backends.cpu import pages
from llmsparse.backends.cpu.library import COLUMNS, DTYPES, ROWS, SLACK, Matrix, library
from llmsparse.backends.cpu.weight import CpuWeight
from llmsparse.errors import MachineError
from llmsparse.storage.direct import BLOCK


class _Span(ctypes.Structure):
    _fields_ = (("begin", c_int64), ("end", c_int64), ("file", c_int32), ("direct", c_int32))


NEW, QUEUED, READING, READ, FAILED = range(5)  # as in readers.h


class _Job(ctypes.Structure):
    _fields_ = (
        ("w", c_void_p), ("s", c_void_p), ("count", c_int64), ("ahead", c_int64), ("state", c_int64), ("next", c_void_p),
        ("early", c_int64),
    )  # fmt: skip


class _Stored(ctypes.Structure):
    _fields_ = (
        ("values", _Span), ("mask", _Span), ("offsets", c_void_p), ("each", c_int64), ("offset_bytes", c_int32),
    )  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Bytes [begin, end) of a file; its descriptor, and whether that reads past the page cache."""

    begin: int
    end: int
    file: int
    direct: bool


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (out, in) of a stack where it lies."""

    shape: tuple[int, int]
    pattern: str
    dtype: torch.dtype
    values: Span
    mask: Span
    offsets: int  # address of out + 1 numbers, where its rows begin in the values of the stack; 0: all rows are as long
    offset_bytes: int  # of one of them

    @property
    def nnz(self) -> int:
        return (self.values.end - self.values.begin) // self.dtype.itemsize


def rows_bytes(rows: int) -> int:
    """Bytes that a reader needs behind those that it reads into."""
    return -(-8 * (rows + 1) // BLOCK) * BLOCK


@dataclass(frozen=True)
class LoadedMatrix:
    """A matrix in tiles in an arena, as C has filled it."""

    of: StoredMatrix
    memory: pages.Arena
    places: tuple[int, int, int]  # of values, masks and starts in the mapping of the arena
    matrix: Matrix

    def weight(self) -> CpuWeight:
        out, width = self.of.shape
        tiles = -(-out // ROWS)
        values, masks, starts = self.places
        made = CpuWeight(
            self._tensor((self.of.nnz + SLACK,), self.of.dtype, values),
            self._tensor((1, tiles, -(-width // COLUMNS), ROWS), torch.int32, masks),
            self._tensor((tiles + 1,), torch.int64, starts),
            self.of.shape,
            self.of.pattern,
        )
        made.__dict__["matrices"] = [self.matrix]
        return made

    def _tensor(self, shape: tuple[int, ...], dtype: torch.dtype, place: int) -> Tensor:
        return torch.frombuffer(self.memory.memory, dtype=dtype, count=math.prod(shape), offset=place).view(shape)


class Loading:
    """Matrices on their way into an arena, which they fill from its beginning."""

    def __init__(self, matrices: Sequence[StoredMatrix], arena: pages.Arena) -> None:
        """MemoryError where the arena has no room for them."""
        count = len(matrices)
        self._stored, self._pointers = (_Stored * count)(), (c_void_p * count)()
        self.loaded: list[LoadedMatrix] = []
        base, arena.taken = arena.address - arena.begin, 0
        for number, matrix in enumerate(matrices):
            (out, width), nnz, values, mask = matrix.shape, matrix.nnz, matrix.values, matrix.mask
            tiles, groups = -(-out // ROWS), -(-width // COLUMNS)
            sizes = (nnz + SLACK) * matrix.dtype.itemsize, 4 * tiles * groups * ROWS, 8 * (tiles + 1)
            places = arena.take(sizes[0]), arena.take(sizes[1]), arena.take(sizes[2])
            made = Matrix(*(base + place for place in places), out, width, DTYPES[matrix.dtype])
            self._stored[number] = _Stored(
                _Span(values.begin, values.end, values.file, values.direct),
                _Span(mask.begin, mask.end, mask.file, mask.direct),
                matrix.offsets, nnz // max(1, out), matrix.offset_bytes,
            )  # fmt: skip
            self._pointers[number] = ctypes.addressof(made)
            self.loaded.append(LoadedMatrix(matrix, arena, places, made))
        self.job = _Job(ctypes.addressof(self._pointers), ctypes.addressof(self._stored), count)

    @property
    def submitted(self) -> bool:
        return self._state != NEW

    @property
    def finished(self) -> bool:
        return self._state >= READ

    @property
    def failed(self) -> bool:
        """Once it is finished: a file cannot be read in this way, or a matrix is damaged."""
        return self._state == FAILED

    @property
    def _state(self) -> int:
        return library().job_state(ctypes.addressof(self.job))


def load(loading: Loading, scratch: pages.Arena) -> bool:
    """Read by whoever calls; whether it could be."""
    room = max(rows_bytes(one.of.shape[0]) for one in loading.loaded)
    status = library().load_stored(
        loading.job.w, loading.job.s, loading.job.count, scratch.address, scratch.address + scratch.size - room
    )
    return not status


class Readers:
    """Threads that read: what is wanted now first, what is read ahead then."""

    def __init__(self, scratches: Sequence[pages.Arena], rows: int) -> None:
        """Scratches, side by side, have room to read any matrix that will come, and `rows_bytes` behind; one for a thread."""
        first = scratches[0]
        self._scratches = scratches
        room = first.size - rows_bytes(rows)
        self._readers = library().readers_open(len(scratches), first.address, first.size, room)
        if not self._readers:
            raise MachineError(
                "experts on disk: the system starts no thread to read them; allow this user more threads (ulimit -u)"
            )

    def submit(self, loading: Loading, ahead: bool) -> None:
        loading.job.ahead = ahead
        library().readers_submit(self._readers, ctypes.addressof(loading.job))

    def hurry(self, loading: Loading) -> None:
        """What was to be read ahead is wanted now."""
        library().readers_hurry(self._readers, ctypes.addressof(loading.job))

    def recall(self, loading: Loading) -> bool:
        """Whether it was not begun, and will not be."""
        return bool(library().readers_recall(self._readers, ctypes.addressof(loading.job)))

    def finished(self) -> int:
        """How many are, of all that were ever submitted."""
        return library().readers_finished(self._readers)

    def wait(self, seen: int) -> None:
        """Until more than `seen` are finished, or it is closed; not for long, so that who waits can be interrupted."""
        library().readers_wait(self._readers, seen)

    def close(self) -> None:
        """Nothing is begun any more."""
        library().readers_close(self._readers)

    def join(self) -> None:
        """After `close`, once: until nobody reads."""
        library().readers_join(self._readers)
        freeing = weakref.finalize(self, library().readers_free, self._readers)  # others may still ask what is finished
        freeing.atexit = False  # or wait, while Python ends
