"""Bitmask-packed matrices out of a file into the order of the CPU kernels, in one call of C: read, checked, repacked.

The interpreter's lock is held only before and after, so whoever multiplies meanwhile does not wait for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.backends.cpu import pages
from llmsparse.backends.cpu.library import COLUMNS, DTYPES, ROWS, SLACK, Matrix, library
from llmsparse.backends.cpu.weight import CpuWeight


class Span(ctypes.Structure):
    """`struct span` of stored.h: bytes of a file, and where they are to be read to, on the boundary of a block."""

    _fields_ = (("begin", c_int64), ("end", c_int64), ("memory", c_void_p), ("file", c_int32), ("direct", c_int32))


class _Stored(ctypes.Structure):
    _fields_ = (
        ("values", Span), ("mask", Span), ("offsets", c_void_p), ("each", c_int64), ("offset_bytes", c_int32),
    )  # fmt: skip


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (out, in) of a stack where it lies."""

    shape: tuple[int, int]
    pattern: str
    dtype: torch.dtype
    values: Span
    mask: Span
    offsets: Tensor | None  # (out + 1,) where its rows begin in the values of the stack; None: all of them are as long


def load(matrices: Sequence[StoredMatrix]) -> list[CpuWeight] | None:
    """What `prepare` makes of each; None where a file cannot be read in this way, or a matrix is damaged."""
    count = len(matrices)
    stored, pointers, weights = (_Stored * count)(), (c_void_p * count)(), list[CpuWeight]()
    for place, matrix in enumerate(matrices):
        out, width = matrix.shape
        nnz = (matrix.values.end - matrix.values.begin) // matrix.dtype.itemsize
        tiles = -(-out // ROWS)
        values = pages.empty((nnz + SLACK,), matrix.dtype)
        masks = pages.empty((1, tiles, -(-width // COLUMNS), ROWS), torch.int32)
        starts = pages.empty((tiles + 1,), torch.int64)
        weight = CpuWeight(values, masks, starts, matrix.shape, matrix.pattern)
        made = Matrix(
            values.data_ptr(), masks.data_ptr(), starts.data_ptr(), out, width, DTYPES[matrix.dtype]
        )
        weight.__dict__["matrices"] = [made]
        pointers[place] = ctypes.addressof(made)
        ends = matrix.offsets
        where = (None, 0) if ends is None else (ends.data_ptr(), ends.element_size())
        stored[place] = _Stored(matrix.values, matrix.mask, where[0], nnz // out if out else 0, where[1])
        weights.append(weight)
    room = torch.empty(max(matrix.shape[0] for matrix in matrices) + 1, dtype=torch.int64)
    status = library().load_stored(pointers, stored, count, room.data_ptr())
    return None if status else weights
