"""Backend "cpu-bitmask": products with bitmask-packed weights on the CPU, by a C kernel built at first use.

For few rows of x, where reading the weight is what takes the time: a weight without its zeros is read sooner. In bf16 with AVX-512 for up
to 192 (`kernel_rows`; 48 where torch may have AMX): a few tiles at a time are unpacked into the cache.
For more rows `expand` it into a scratch buffer and let torch multiply. AVX-512 (VBMI2, BF16), AVX2 and portable kernels are
chosen by what the CPU has; the result does not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p

import torch
from torch import Tensor, get_num_threads

from llmsparse.backends.cpu.library import DTYPES, Target, kernel_rows, kernels, library, rows_beside_copy, why_not
from llmsparse.backends.cpu.weight import CpuWeight, prepare

__all__ = [
    "CpuWeight",
    "expand",
    "kernel_rows",
    "kernels",
    "matvec",
    "matvecs",
    "prepare",
    "rows_beside_copy",
    "why_not",
]


def matvec(weight: CpuWeight, x: Tensor, bias: Tensor | None = None, *, kernel: str | None = None) -> Tensor:
    """x (..., in) · Wᵀ + bias (out,) → (..., out) in x's dtype, accumulated in float32.

    x and bias are bfloat16 or float32. No gradient flows. `kernel` takes a name of `kernels()` in place of the fastest.
    """
    return matvecs((weight,), x, (bias,), kernel=kernel)[0]


def matvecs(
    weights: Sequence[CpuWeight], x: Tensor, biases: Sequence[Tensor | None], *, kernel: str | None = None
) -> list[Tensor]:
    """The same for weights (out_i, in) of one dtype, in one call: the work is shared out to threads once."""
    width, dtype = weights[0].shape[-1], x.dtype
    rows = x.numel() // width if width else 0
    if x.shape[-1] != width or rows < 1 or not x.is_cpu:
        raise ValueError(f"x is {list(x.shape)} on {x.device}, wanted (..., {width}) with at least one row on the cpu")
    numbers = kernels(weights[0].dtype, dtype)
    number = numbers[kernel] if kernel else next(iter(numbers.values()))
    x = x.contiguous()
    count, lead = len(weights), x.shape[:-1]
    pointers, targets, results = (c_void_p * count)(), (Target * count)(), list[Tensor]()
    held = [bias if bias is None else _fitting(bias, weight) for weight, bias in zip(weights, biases, strict=True)]
    for place, weight in enumerate(weights):
        if place and (weight.shape[-1] != width or weight.dtype != weights[0].dtype):
            raise ValueError(f"{weight.dtype} {list(weight.shape)} beside {weights[0].dtype} {list(weights[0].shape)}")
        y = torch.empty((*lead, weight.shape[0]), dtype=dtype)
        pointers[place], targets[place].y = weight.address, y.data_ptr()
        if (bias := held[place]) is not None:
            targets[place].bias, targets[place].bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
        results.append(y)
    status = library().matvec(pointers, targets, count, number, x.data_ptr(), DTYPES[dtype], rows, get_num_threads())
    if status:
        raise MemoryError
    return results


def _fitting(bias: Tensor, weight: CpuWeight) -> Tensor:
    if bias.shape != weight.shape[:1] or bias.dtype not in DTYPES or not bias.is_cpu:
        found = f"bias is {list(bias.shape)} {bias.dtype} on {bias.device}"
        raise ValueError(f"{found}, wanted {list(weight.shape[:1])} of bfloat16 or float32 on the cpu")
    return bias.contiguous()


def expand(weight: CpuWeight, out: Tensor, *, kernel: str | None = None) -> Tensor:
    """Unpack the weight into `out`, contiguous and of its shape and dtype, zeros included; returns `out`."""
    if out.shape != weight.shape or out.dtype != weight.dtype or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(
            f"out is {list(out.shape)} {out.dtype}, wanted {list(weight.shape)} {weight.dtype}, contiguous"
        )
    numbers = kernels(weight.dtype, weight.dtype)
    number = numbers[kernel] if kernel else next(iter(numbers.values()))
    for matrix, matrix_out in zip(weight.matrices, out.view(-1, *out.shape[-2:]), strict=True):
        library().expand(ctypes.byref(matrix), number, matrix_out.data_ptr(), get_num_threads())
    return out
