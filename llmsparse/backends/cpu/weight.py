"""A bitmask-packed weight in the order in which the CPU kernels read it."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmsparse.backends.cpu import pages
from llmsparse.backends.cpu.library import COLUMNS, DTYPES, ROWS, SLACK, Matrix, library
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.formats.bitmask import Bitmask, nofm


@dataclass(frozen=True, eq=False)
class CpuWeight:
    """A weight of `shape` (..., out, in) in tiles of 4 rows × 32 columns (tiles.h); as many bytes as packed.

    The dtype is bfloat16 or float32. `prepare` makes one, `packed` gives back exactly what it was made of.
    """

    values: Tensor  # (nnz + SLACK,), or more
    masks: Tensor  # int32 (matrices, tiles, groups, ROWS)
    starts: Tensor  # int64 (matrices · tiles + 1,): the first value of every tile
    shape: tuple[int, ...]
    pattern: str  # unstructured, or N:M

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def nnz(self) -> int:
        return int(self.starts[-1])

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.nnz * self.values.element_size() + self.masks.nbytes + self.starts.nbytes

    def part(self, index: int) -> CpuWeight:
        """Matrix `index` of a weight (matrices, out, in), such as one expert. It shares memory with the whole."""
        tiles = self.masks.shape[1]
        starts = self.starts[index * tiles : (index + 1) * tiles + 1]
        begin = int(starts[0])
        return CpuWeight(
            self.values[begin:], self.masks[index : index + 1], starts - begin, self.shape[-2:], self.pattern
        )

    def packed(self) -> Bitmask:
        """The neutral format, equal to the bit to what was given to `prepare`."""
        out, width = self.shape[-2:]
        rows, row_bytes = math.prod(self.shape[:-1]), -(-width // 8)
        values = torch.empty(self.nnz, dtype=self.dtype)
        mask = torch.empty((rows, row_bytes), dtype=torch.uint8)
        offsets = torch.zeros(rows + 1, dtype=torch.int64)
        for number, matrix in enumerate(self.matrices):
            here = number * out
            pointers = (values.data_ptr(), mask[here:].data_ptr(), offsets[here:].data_ptr())
            library().restore(ctypes.byref(matrix), *pointers, torch.get_num_threads())
        group = nofm(self.pattern)
        if group is not None:
            return Bitmask(
                values.view(rows, width * group.n // group.m),
                mask.view(*self.shape[:-1], row_bytes),
                None,
                self.shape,
                self.pattern,
            )
        offsets = offsets.to(torch.int32) if self.nnz < 2**31 else offsets
        return Bitmask(values, mask.view(*self.shape[:-1], row_bytes), offsets, self.shape, self.pattern)

    @cached_property
    def matrices(self) -> list[Matrix]:
        """What C is given: one for each of the leading dimensions. Its pointers live as long as this weight."""
        tiles, element = self.masks.shape[1], DTYPES[self.dtype]
        return [
            Matrix(
                self.values.data_ptr(),
                self.masks[number].data_ptr(),
                self.starts[number * tiles :].data_ptr(),
                *self.shape[-2:],
                element,
            )
            for number in range(self.masks.shape[0])
        ]

    @cached_property
    def address(self) -> int:
        """Of its first matrix."""
        return ctypes.addressof(self.matrices[0])

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has pointers of its own
        return CpuWeight, (self.values, self.masks, self.starts, self.shape, self.pattern)


def prepare(packed: Bitmask) -> CpuWeight:
    """Repack a weight (..., out, in) of bfloat16 or float32 on the CPU. `packed` is only read, and not kept.

    Raises MachineError where the kernels cannot run (`why_not`), RecipeError for another dtype or device, and
    CheckpointError where mask, offsets and values disagree: afterwards nothing can read out of bounds.
    """
    c, dtype = library(), packed.values.dtype
    devices = {tensor.device.type for tensor in packed.tensors().values()}
    if dtype not in DTYPES or devices != {"cpu"}:
        where = " and ".join(sorted(devices))
        raise RecipeError(
            f"the CPU kernels take weights of bfloat16 or float32 on the cpu, not {dtype} on {where}; use backend dense"
        )
    *lead, out, width = packed.shape
    matrices, rows, nnz = math.prod(lead), math.prod(packed.shape[:-1]), packed.values.numel()
    values, mask = packed.values.contiguous(), packed.mask.contiguous()
    group = nofm(packed.pattern)
    if group is not None:
        offsets = torch.arange(rows + 1) * (width * group.n // group.m)  # int64
    else:
        assert packed.offsets is not None
        offsets = packed.offsets.to(torch.int64).contiguous()
    fits = mask.numel() == rows * -(-width // 8) and mask.dtype == torch.uint8 and offsets.numel() == rows + 1
    bad = c.first_bad_row(mask.data_ptr(), offsets.data_ptr(), rows, width, nnz) if fits else 0
    if bad >= 0:
        raise CheckpointError(
            f"packed weight {list(packed.shape)}: mask, offsets and values disagree at row {bad}; pack the checkpoint again"
        )
    tiles, groups = -(-out // ROWS), -(-width // COLUMNS)
    firsts = torch.arange(matrices)[:, None] * out + torch.arange(tiles) * ROWS  # (matrices, tiles): rows
    weight = CpuWeight(
        pages.zeros((nnz + SLACK,), dtype),
        pages.zeros((matrices, tiles, groups, ROWS), torch.int32),
        torch.cat((offsets[firsts.flatten()], offsets[-1:])),
        packed.shape,
        packed.pattern,
    )
    for number, matrix in enumerate(weight.matrices):
        here = number * out
        pointers = (values.data_ptr(), mask.data_ptr() + here * -(-width // 8), offsets[here:].data_ptr())
        c.repack(ctypes.byref(matrix), *pointers, torch.get_num_threads())
    return weight
