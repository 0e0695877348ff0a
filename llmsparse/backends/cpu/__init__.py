"""Backend "cpu-bitmask": products with bitmask-packed weights on the CPU, by a C kernel built at first use.

For few rows of x (`kernel_rows`), where reading the weight is what takes the time: a weight without its zeros is read sooner.
For more rows `expand` it into a scratch buffer and let torch multiply. AVX-512 (VBMI2, BF16), AVX2 and portable kernels are
chosen by what the CPU has; the result does not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llmsparse.backends.cpu.library import DTYPES, kernel_rows, kernels, library, why_not
from llmsparse.backends.cpu.weight import CpuWeight, prepare

__all__ = ["CpuWeight", "expand", "kernel_rows", "kernels", "matvec", "prepare", "why_not"]


def matvec(weight: CpuWeight, x: Tensor, bias: Tensor | None = None, *, kernel: str | None = None) -> Tensor:
    """x (..., in) · Wᵀ + bias (out,) → (..., out) in x's dtype, accumulated in float32.

    x and bias are bfloat16 or float32. No gradient flows. `kernel` takes a name of `kernels()` in place of the fastest.
    """
    out, width = weight.shape
    rows = x.numel() // width if width else 0
    if x.shape[-1] != width or rows < 1:
        raise ValueError(f"x is {list(x.shape)}, wanted (..., {width}) with at least one row")
    if bias is not None and (bias.shape != (out,) or bias.dtype not in DTYPES):
        raise ValueError(f"bias is {list(bias.shape)} {bias.dtype}, wanted [{out}] of bfloat16 or float32")
    if not x.device.type == "cpu" == (bias.device.type if bias is not None else "cpu"):
        raise ValueError(f"x is on {x.device}, wanted on the cpu")
    numbers = kernels(weight.dtype, x.dtype)
    number = numbers[kernel] if kernel else next(iter(numbers.values()))
    x = x.contiguous()
    bias = bias.contiguous() if bias is not None else None
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype)
    status = library().matvec(
        ctypes.byref(weight.matrices[0]),
        number,
        x.data_ptr(),
        DTYPES[x.dtype],
        rows,
        bias.data_ptr() if bias is not None else None,
        DTYPES[bias.dtype] if bias is not None else 0,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError
    return y


def expand(weight: CpuWeight, out: Tensor, *, kernel: str | None = None) -> Tensor:
    """Unpack the weight into `out`, contiguous and of its shape and dtype, zeros included; returns `out`."""
    if out.shape != weight.shape or out.dtype != weight.dtype or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(
            f"out is {list(out.shape)} {out.dtype}, wanted {list(weight.shape)} {weight.dtype}, contiguous"
        )
    numbers = kernels(weight.dtype, weight.dtype)
    number = numbers[kernel] if kernel else next(iter(numbers.values()))
    for matrix, matrix_out in zip(weight.matrices, out.view(-1, *out.shape[-2:]), strict=True):
        library().expand(ctypes.byref(matrix), number, matrix_out.data_ptr(), torch.get_num_threads())
    return out
