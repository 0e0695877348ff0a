"""Products on the CPU that read only the columns of a weight whose inputs count, by a C kernel, for a few tokens.

`product(matrix, cut, x, bias)` is `cut(x) · Wᵀ + bias` (sparsity/activation.py): the same inputs count, to the bit. AVX-512, AVX2 and
portable kernels are chosen by what the CPU has; the result depends neither on the number of threads, which is torch's, nor on how
many tokens there are. The weight lies column by column, dense or without its zeros.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llmsparse.backends.cpu import pages
from llmsparse.backends.cpu.kernel_library import KernelLibrary
from llmsparse.backends.cpu.library import DTYPES
from llmsparse.errors import RecipeError
from llmsparse.sparsity.activation import Cut

GROUP, TILE, MOST, SLACK = (
    32,
    512,
    4,
    64,
)  # as in columns.c: rows of a mask, of a tile, of x; bytes behind the last value


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("values", c_void_p),
        ("masks", c_void_p),
        ("starts", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("dtype", c_int32),
    )


class _Rule(ctypes.Structure):
    _fields_ = (("norms", c_void_p), ("centre", c_void_p), ("threshold", c_float), ("keep", c_int64))


SIGNATURES = {
    "columns_expand": (None, (POINTER(_Matrix), c_void_p, c_int32)),
    "kernel_name": (c_char_p, (c_int32,)),
    "kernel_fits": (c_int32, (c_int32, c_int32, c_int32)),
    "columns_product": (
        c_int64,
        (POINTER(_Matrix), POINTER(_Rule), c_int32, c_void_p, c_int32, c_void_p, c_void_p, c_int32),
    ),
}
LIBRARY = KernelLibrary(
    "CPU kernel of columns", ("columns.c", "columns_x86.h", "avx.h", "floats.h", "share.h", "team.h"), SIGNATURES
)


@dataclass(frozen=True)
class Columns:
    """A weight (out, in), column by column."""

    shape: tuple[int, int]  # (out, in)
    dtype: torch.dtype
    values: Tensor  # dense (in, out); packed (kept + slack,)
    masks: Tensor | None = None  # packed (in, groups) int32
    starts: Tensor | None = None  # packed (in, tiles) int64

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.masks, self.starts) if part is not None)

    @classmethod
    def of(cls, weight: Tensor) -> Columns:
        """A dense weight (out, in); in its own memory where it lies so, and else copied."""
        columns = weight.T
        if not columns.is_contiguous():
            columns = pages.zeros(columns.shape, weight.dtype).copy_(columns)
        return cls((weight.shape[0], weight.shape[1]), weight.dtype, columns)

    @classmethod
    def without_zeros(cls, weight: Tensor) -> Columns:
        """A weight (out, in) with zeros, which are not stored."""
        out, width = weight.shape
        groups, tiles = -(-out // GROUP), -(-out // TILE)
        kept = torch.zeros(width, groups * GROUP, dtype=torch.bool)
        kept[:, :out] = weight.T != 0
        bits = kept.view(width, groups, GROUP).to(torch.int64) << torch.arange(GROUP)
        masks = bits.sum(-1).to(torch.int32)  # the highest bit becomes the sign
        counts = torch.zeros(width, tiles * TILE, dtype=torch.bool)
        counts[:, :out] = kept[:, :out]
        counts = counts.view(width, tiles, TILE).sum(-1).flatten()
        starts = (counts.cumsum(0) - counts).view(width, tiles)
        found = weight.T[kept[:, :out]]
        values = pages.zeros((found.numel() + SLACK // weight.element_size(),), weight.dtype)
        values[: found.numel()] = found
        return cls((out, width), weight.dtype, values, pages.copy(masks), starts.contiguous())

    def dense(self) -> Tensor:
        """The weight (out, in) again."""
        if self.masks is None:
            return self.values.T
        columns = torch.empty(self.shape[::-1], dtype=self.dtype)
        LIBRARY.loaded().columns_expand(described(self), columns.data_ptr(), torch.get_num_threads())
        return columns.T


def why_not() -> str | None:
    """Why the kernel cannot run here, in one line; None if it can. Builds it at the first call."""
    return LIBRARY.why_not()


@cache
def kernels(dtype: torch.dtype, packed: bool = False) -> dict[str, int]:
    """Name → number of the kernels that this CPU can run on weights of `dtype`, the fastest first.

    RecipeError for any other dtype than bfloat16 and float32, MachineError where there is no kernel (`why_not`).
    """
    if dtype not in DTYPES:
        raise RecipeError(f"the CPU kernel of columns takes bfloat16 or float32, not {dtype}")
    return LIBRARY.fitting(DTYPES[dtype], int(packed))


def product(matrix: Columns, cut: Cut, x: Tensor, bias: Tensor | None = None, *, kernel: str | None = None) -> Tensor:
    """cut(x) (..., in) · Wᵀ + bias (out,) → (..., out), all of one dtype, accumulated in float32.

    Up to MOST rows of x read together the columns that count for any of them. No gradient flows. `kernel` takes a name of
    `kernels()` in place of the fastest. ValueError for what does not fit.
    """
    out, width = matrix.shape
    tensors = (matrix.values, x) if bias is None else (matrix.values, x, bias)
    if x.shape[-1:] != (width,) or not x.numel() or (bias is not None and bias.shape != (out,)):
        raise ValueError(f"x is {list(x.shape)}, wanted (..., {width}) with at least one row, bias [{out}] or none")
    if any(tensor.dtype != matrix.dtype or tensor.device.type != "cpu" for tensor in tensors):
        found = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
        raise ValueError(f"weight, x and bias are {found}, wanted one dtype on the cpu")
    numbers = kernels(matrix.dtype, matrix.masks is not None)
    number = numbers[kernel] if kernel else next(iter(numbers.values()))
    x, bias = x.contiguous(), bias if bias is None else bias.contiguous()
    y, rows = torch.empty((*x.shape[:-1], out), dtype=x.dtype), x.numel() // width
    weight, rule = described(matrix), _rule(cut, width)
    run, threads, size = LIBRARY.loaded().columns_product, torch.get_num_threads(), x.element_size()
    at, to, added = x.data_ptr(), y.data_ptr(), None if bias is None else bias.data_ptr()
    for row in range(0, rows, MOST):
        some = min(MOST, rows - row)
        if run(weight, rule, number, at + row * width * size, some, added, to + row * out * size, threads) < 0:
            raise MemoryError
    return y


def described(matrix: Columns) -> _Matrix:
    masks, starts = (None if part is None else part.data_ptr() for part in (matrix.masks, matrix.starts))
    return _Matrix(matrix.values.data_ptr(), masks, starts, *matrix.shape, DTYPES[matrix.dtype])


def _rule(cut: Cut, width: int) -> _Rule:
    for part in (cut.norms, cut.centre):
        if part is not None and (part.shape != (width,) or part.dtype != torch.float32 or not part.is_contiguous()):
            raise ValueError(f"norms or centre are {part.dtype} {list(part.shape)}, wanted float32 [{width}]")
    norms, centre = (None if part is None else part.data_ptr() for part in (cut.norms, cut.centre))
    if cut.keep is not None:
        return _Rule(norms, centre, 0.0, min(cut.keep, width))
    assert cut.threshold is not None
    return _Rule(norms, centre, cut.threshold, -1)


def usable(weight: Tensor) -> bool:
    """Whether the kernel is there for a weight, and of use."""
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or why_not() is not None:
        return False
    return next(iter(kernels(weight.dtype))) != "portable"
