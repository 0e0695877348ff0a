"""Memory on pages of 2 MB for weights: a stream over pages of 4 KB waits for address translation, on a busy machine most.

Where Linux hands out large pages on request (`madvise`, its usual setting) the C library's memory does not ask for them. Small tensors
share a mapping, which is given back when the last of them is gone.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

HUGE = 2**21
SHARED = 16 * HUGE  # bytes of a mapping that small tensors share; larger ones have their own
ALIGNED = 64
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@cache
def why_not() -> str | None:
    """Why memory lies on plain pages here, in a few words; None where it lies on large ones."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return "this system has no madvise(MADV_HUGEPAGE)"
    try:
        setting = SETTING.read_text(encoding="ascii")
    except OSError:
        return "this kernel has no transparent huge pages"
    if "[never]" in setting:
        return f"{SETTING} says never"
    try:
        _mapping(HUGE)
    except OSError as error:
        return f"madvise refuses ({error.strerror})"
    return None


class Arena:
    """A part of a mapping that is filled from its beginning, again and again: what lay in it before is written over."""

    def __init__(self, memory: mmap.mmap, begin: int, size: int) -> None:
        self.memory, self.begin, self.size = memory, begin, size
        self.taken = 0  # bytes

    @classmethod
    def row(cls, count: int, size: int) -> list[Arena]:
        """So many, side by side in one mapping. What is never filled takes no memory."""
        each = _aligned(size)
        memory = mmap.mmap(-1, count * each + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if why_not() is None:
            memory.madvise(mmap.MADV_HUGEPAGE)
        return [cls(memory, _offset(memory) + number * each, each) for number in range(count)]

    @cached_property
    def address(self) -> int:
        """Of its first byte."""
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=1, offset=self.begin).data_ptr()

    def take(self, size: int) -> int:
        """Where in the mapping the next `size` bytes begin. MemoryError where there is no more room."""
        begin, self.taken = self.begin + self.taken, self.taken + _aligned(size)
        if self.taken > self.size:
            raise MemoryError
        return begin

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """None where there is no more room."""
        size = math.prod(shape) * dtype.itemsize
        if not size or self.taken + _aligned(size) > self.size:
            return None
        tensor = torch.frombuffer(self.memory, dtype=dtype, count=math.prod(shape), offset=self.take(size))
        return tensor.view(tuple(shape)).zero_()


class _Filled(threading.local):
    arena: Arena | None = None


_FILLED = _Filled()


@contextmanager
def within(arena: Arena) -> Generator[None]:
    """Within it `zeros` and `copy` of this thread take their memory from an arena, from its beginning, as far as it reaches."""
    arena.taken, before = 0, _FILLED.arena
    _FILLED.arena = arena
    try:
        yield
    finally:
        _FILLED.arena = before


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU, aligned to a cache line."""
    if _FILLED.arena is not None and (placed := _FILLED.arena.zeros(shape, dtype)) is not None:
        return placed
    size = math.prod(shape) * dtype.itemsize
    if not size or why_not() is not None:
        return torch.zeros(tuple(shape), dtype=dtype)
    with torch.inference_mode(False):
        memory, offset = _place(size)
        return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(tuple(shape))


def copy(tensor: Tensor) -> Tensor:
    """The same numbers in memory of their own, contiguous where the tensor is."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        return tensor.clone()
    return zeros(tensor.shape, tensor.dtype).copy_(tensor)


class _Shared:
    """The mapping that is being filled, as long as a tensor lies in it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.mapping: weakref.ref[mmap.mmap] | None = None
        self.taken = 0

    def place(self, size: int) -> tuple[mmap.mmap, int]:
        with self.lock:
            memory = self.mapping() if self.mapping is not None else None
            if memory is None or self.taken + size > SHARED + _offset(memory):
                memory = _mapping(SHARED)
                self.mapping, self.taken = weakref.ref(memory), _offset(memory)
            begin = self.taken
            self.taken += _aligned(size)
            return memory, begin


_SHARED = _Shared()


def _place(size: int) -> tuple[mmap.mmap, int]:
    """A mapping and where in it `size` bytes are free."""
    if size < SHARED // 2:
        return _SHARED.place(size)
    memory = _mapping(size)
    return memory, _offset(memory)


def _mapping(size: int) -> mmap.mmap:
    """Private memory with room for `size` bytes from the first large page on. What is not touched takes none."""
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _offset(memory: mmap.mmap) -> int:
    """Of the first large page."""
    return -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % HUGE
