"""Products on the CPU with nested weights, small integers times a step a row, for few tokens: C kernels built at first use.

Exact: a weight is what the format says, whatever the kernel, and sums are in float32; or, where asked for, with activations rounded
to 8 bits. AVX-512 (VBMI, BF16, VNNI), AVX2 and portable kernels are chosen by what the CPU has; the result does not depend on the
number of threads, which is torch's.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import ctypes
import math
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from llmsparse.backends.cpu import pages
from llmsparse.backends.cpu.kernel_library import KernelLibrary
from llmsparse.backends.cpu.library import DTYPES, has_amx, rows_up_to
from llmsparse.errors import CheckpointError
from llmsparse.formats.digits import Code
from llmsparse.formats.nested import Nested

ROWS, RUN, SLACK, DEEPEST = 4, 64, 64, 130  # as in nested.h
SMALLEST, HIGHEST = -8, 7  # what an escape of 4 bits holds
WIDE = 0.02  # share of numbers beyond that, from which on a weight is a mask and int8 ...
WIDE_INT8 = 0.004  # ... and where activations have 8 bits: a listed number takes the time of 350 columns in int8


class Matrix(ctypes.Structure):
    """`struct nested` of nested.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("pairs", "escapes", "counts", "starts", "listed", "columns_listed", "numbers_listed", "steps")),
        *((name, c_int64) for name in ("rows", "columns", "group")),
        *((name, c_int32) for name in ("wide", "stored", "dtype")),
    )  # fmt: skip


class CodeOfC(ctypes.Structure):
    """`struct code` of nested.h."""

    _fields_ = (("levels", c_int32), *((name, c_int32 * DEEPEST) for name in ("digits", "fours", "finals")))


LIBRARY = KernelLibrary(
    "CPU kernels of nested weights",
    (
        "nested.c",
        "nested.h",
        "nested_x86.h",
        "nested_int8.h",
        "nested_int8_x86.h",
        "many.h",
        "avx.h",
        "floats.h",
        "share.h",
        "team.h",
    ),
    {
        "kernel_name": (c_char_p, (c_int32,)),
        "kernel_fits": (c_int32, (c_int32, c_int32, c_int32, c_int32, c_int32)),
        "nested_decode": (
            None,
            (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int32),
        ),
        "nested_measure": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p)),
        "nested_fill": (None, (c_void_p, c_void_p)),
        "nested_matvec": (c_int32, (c_void_p, c_int32, c_void_p, c_int32, c_void_p, c_void_p, c_int32)),
        "nested_unpack": (None, (c_void_p, c_int32, c_void_p, c_void_p, c_int32)),
    },
)
KERNEL_ROWS = {  # rows of x up to which it beats unpacking; in bf16 on Zen 4
    "avx512-bf16": 192, "avx512": 8, "avx2": 2, "portable": 0, "avx512-vnni": 8, "avx2-int8": 2, "portable-int8": 0,
}  # fmt: skip
BESIDE_COPY = {"avx512-bf16": 32}  # ... and a dense copy, as in library.py
BESIDE_AMX = {"avx512-bf16": 8}


def why_not() -> str | None:
    """Why the kernels cannot run here, in one line; None if they can. Builds them at the first call."""
    return LIBRARY.why_not()


@dataclass(frozen=True, eq=False)
class CpuNested:
    """A weight (..., out, in) in tiles of 4 rows × 64 columns (nested.h). `prepare` makes one, `packed` gives back exactly what
    it was made of."""

    pairs: Tensor  # uint8 (matrices, tiles, runs, RUN); wide: int64 (matrices, tiles, runs, ROWS)
    escapes: list[Tensor]  # uint8, of each matrix
    counts: Tensor  # uint8 (matrices, tiles, runs, ROWS / 2); wide: (matrices, 0)
    starts: Tensor  # int64 (matrices, tiles + 1)
    listed: Tensor  # int64 (matrices, out + 1)
    list_of: list[tuple[Tensor, Tensor]]  # int32 columns and int8 numbers, of each matrix
    steps: Tensor  # bfloat16 (matrices · out, groups)
    frame: Nested  # of which it was made, without tensors

    @property
    def shape(self) -> tuple[int, ...]:
        return self.frame.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.frame.dtype

    @property
    def wide(self) -> bool:
        return self.pairs.dtype == torch.int64

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        lists = sum(columns.nbytes + numbers.nbytes for columns, numbers in self.list_of)
        whole = (self.pairs, self.counts, self.starts, self.listed, self.steps, *self.escapes)
        return lists + sum(tensor.nbytes for tensor in whole)

    @cached_property
    def matrices(self) -> list[Matrix]:
        """What C is given: one for each of the leading dimensions. Its pointers live as long as this weight."""
        out, width = self.shape[-2:]
        return [
            Matrix(
                self.pairs[n].data_ptr(),
                self.escapes[n].data_ptr(),
                self.counts[n].data_ptr(),
                self.starts[n].data_ptr(),
                self.listed[n].data_ptr(),
                *(tensor.data_ptr() for tensor in self.list_of[n]),
                self.steps[n * out :].data_ptr(),
                out,
                width,
                self.frame.group,
                self.wide,
                DTYPES[self.frame.stored],
                DTYPES[self.dtype],
            )
            for n in range(len(self.pairs))
        ]

    def kernel(self, name: str | None = None, int8: bool = False) -> int:
        """The number of a kernel, or of the fastest; `int8`: of those with activations of 8 bits."""
        found = kernels(self.frame.stored, self.dtype, self.wide, int8)
        return found[name] if name else next(iter(found.values()))

    def numbers(self) -> Tensor:
        """q, int8 (..., out, in)."""
        q = torch.zeros(self.shape, dtype=torch.int8)
        for matrix, into in zip(self.matrices, q.view(-1, *self.shape[-2:]), strict=True):
            LIBRARY.loaded().nested_unpack(
                ctypes.byref(matrix), self.kernel(), None, into.data_ptr(), torch.get_num_threads()
            )
        return q

    def packed(self) -> Nested:
        """The neutral format, equal to the bit to what was given to `prepare`."""
        frame = self.frame
        whole = Nested.written(self.numbers(), self.steps, frame.code, frame.tile_rows, frame.group, frame.stored)
        return replace(whole, dtype=frame.dtype, step_rows=frame.step_rows)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has pointers of its own
        return CpuNested, (
            self.pairs,
            self.escapes,
            self.counts,
            self.starts,
            self.listed,
            self.list_of,
            self.steps,
            self.frame,
        )


def kernels(stored: torch.dtype, dtype: torch.dtype, wide: bool = False, int8: bool = False) -> dict[str, int]:
    """Name → number of the kernels that this CPU can run on weights that are rounded to `stored` and computed with in `dtype`,
    exactly or with activations of 8 bits, the fastest first. MachineError where there are none (`why_not`)."""
    return LIBRARY.fitting(DTYPES[stored], DTYPES[dtype], wide, int8)


@cache
def kernel_rows(stored: torch.dtype, dtype: torch.dtype, wide: bool = False, int8: bool = False) -> int:
    """Up to how many rows of x `matvec` takes less time on this CPU than `expand` and torch; 0 where it never does."""
    return rows_up_to(next(iter(kernels(stored, dtype, wide, int8))), KERNEL_ROWS, BESIDE_AMX, amx=has_amx())


def rows_beside_copy(stored: torch.dtype, dtype: torch.dtype, int8: bool = False) -> int:
    """Up to how many rows of x `matvec` takes less time than torch with a dense copy of the weight."""
    limit = kernel_rows(stored, dtype, int8=int8)
    return min(limit, BESIDE_COPY.get(next(iter(kernels(stored, dtype, int8=int8))), limit))


def prepare(packed: Nested, *, int8: bool = False) -> CpuNested:
    """Repack a weight on the CPU, of bfloat16 or float32 with steps for whole rows or multiples of RUN columns. `packed` is only
    read, and not kept. `int8`: for products with activations of 8 bits. CheckpointError where its stream is damaged."""
    q = numbers_of(packed)
    *lead, out, width = packed.shape
    matrices, tiles, runs = math.prod(lead), -(-out // ROWS), -(-width // RUN)
    beyond = int((q < SMALLEST).sum()) + int((q > HIGHEST).sum())
    wide = beyond > _wide_from(packed, int8) * q.numel()
    shape, kind = ((ROWS,), torch.int64) if wide else ((RUN,), torch.uint8)
    pairs = pages.zeros((matrices, tiles, runs, *shape), kind)
    starts = torch.zeros((matrices, tiles + 1), dtype=torch.int64)
    listed = torch.zeros((matrices, out + 1), dtype=torch.int64)
    frame = packed.emptied_of_tensors()
    c, none = LIBRARY.loaded(), (torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int8))
    steps = packed.steps.contiguous()
    counts = pages.zeros((matrices, *((0,) if wide else (tiles, runs, ROWS // 2))), torch.uint8)
    made = CpuNested(pairs, [pairs.new_zeros(0)] * matrices, counts, starts, listed, [none] * matrices, steps, frame)
    escapes: list[Tensor] = []
    list_of: list[tuple[Tensor, Tensor]] = []
    for n, (matrix, numbers) in enumerate(zip(made.matrices, q.view(-1, out, width), strict=True)):
        found = (tensor[n].data_ptr() for tensor in (starts, listed, counts))
        c.nested_measure(ctypes.byref(matrix), numbers.data_ptr(), *found)
        escapes.append(pages.zeros((int(starts[n, -1]) + SLACK,), torch.uint8))
        count = int(listed[n, -1])
        list_of.append((torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int8)))
    made = replace(made, escapes=escapes, list_of=list_of)
    for matrix, numbers in zip(made.matrices, q.view(-1, out, width), strict=True):
        c.nested_fill(ctypes.byref(matrix), numbers.data_ptr())
    return made


def _wide_from(packed: Nested, int8: bool) -> float:
    """The share of numbers beyond an escape from which on a mask and int8 are multiplied faster."""
    if not int8:
        return WIDE
    fastest = next(iter(kernels(packed.stored, packed.dtype, int8=True)))
    return WIDE_INT8 if fastest in kernels(packed.stored, packed.dtype, wide=True, int8=True) else WIDE


def beside(rows: int, columns: int) -> int:
    """Bytes that `prepare` needs for a while: a matrix's numbers, and a mask of them."""
    return 2 * rows * columns


def numbers_of(packed: Nested) -> Tensor:
    """What `packed.numbers()` gives, in a tenth of the time. CheckpointError where the stream is damaged."""
    *lead, out, width = packed.shape
    q = torch.zeros(packed.shape, dtype=torch.int8)
    starts = [m * out + r for m in range(math.prod(lead)) for r in range(0, out, packed.tile_rows)]
    first = torch.tensor([*starts, math.prod(lead) * out], dtype=torch.int64)
    tiles, stream = packed.tiles.to(torch.int64), packed.stream.contiguous()
    right = torch.zeros(len(starts), dtype=torch.int32)
    LIBRARY.loaded().nested_decode(
        stream.data_ptr(), tiles.data_ptr(), first.data_ptr(), len(starts), width, ctypes.byref(_code(packed.code)),
        q.data_ptr(), right.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if not bool(right.all()):
        row = starts[int((right == 0).nonzero()[0, 0])]
        raise CheckpointError(f"the stream of row {row} of a nested weight is damaged; quantize the model again")
    return q


def matvec(
    weight: CpuNested, x: Tensor, bias: Tensor | None = None, *, int8: bool = False, kernel: str | None = None
) -> Tensor:
    """x (..., in) · Wᵀ + bias (out,) → (..., out), all of the weight's dtype, accumulated in float32.

    `int8`: of x with 8 bits a number and a scale for 256 columns of a token, 64 where groups of columns have steps of their own;
    W = steps · q is not rounded then. No gradient flows. `kernel` takes a name of `kernels()` in place of the fastest.
    """
    out, width = weight.shape
    rows = x.numel() // width if width else 0
    if x.shape[-1] != width or rows < 1 or (bias is not None and bias.shape != (out,)):
        raise ValueError(f"x is {list(x.shape)}, wanted (..., {width}) with at least one row, bias [{out}] or none")
    if any(tensor.dtype != weight.dtype or tensor.device.type != "cpu" for tensor in (x, x if bias is None else bias)):
        raise ValueError(f"x is {x.dtype} on {x.device}, wanted {weight.dtype} on the cpu, and bias alike")
    x, bias = x.contiguous(), bias if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype)
    status = LIBRARY.loaded().nested_matvec(
        ctypes.byref(weight.matrices[0]), weight.kernel(kernel, int8), x.data_ptr(), rows, None if bias is None else bias.data_ptr(),
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise MemoryError
    return y


def expand(weight: CpuNested, out: Tensor, *, kernel: str | None = None) -> Tensor:
    """Unpack the weight into `out`, contiguous and of its shape and dtype; returns `out`."""
    if out.shape != weight.shape or out.dtype != weight.dtype or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(
            f"out is {list(out.shape)} {out.dtype}, wanted {list(weight.shape)} {weight.dtype}, contiguous"
        )
    for matrix, into in zip(weight.matrices, out.view(-1, *out.shape[-2:]), strict=True):
        LIBRARY.loaded().nested_unpack(
            ctypes.byref(matrix), weight.kernel(kernel), into.data_ptr(), None, torch.get_num_threads()
        )
    return out


def _code(code: Code) -> CodeOfC:
    made = CodeOfC(levels=len(code.digits))
    for level, width in enumerate(code.digits):
        made.digits[level], made.finals[level] = width, code.finals[level]
        made.fours[level] = level in code.fours
    return made
