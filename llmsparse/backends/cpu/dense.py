"""Products with dense weights on the CPU for few tokens, by a C kernel that reads the weight where it lies as fast as it can be read.

torch's own product reads bf16 on one thread at half of that. AVX-512 (BF16), AVX2 and portable kernels are chosen by what the CPU
has; the result does not depend on the number of threads, which is torch's, nor on how many tokens there are.
"""

from __future__ import annotations

from bisect import bisect_left
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from llmsparse.backends.cpu.kernel_library import KernelLibrary
from llmsparse.backends.cpu.library import DTYPES
from llmsparse.errors import RecipeError

SIGNATURES = {
    "kernel_name": (c_char_p, (c_int32,)),
    "kernel_fits": (c_int32, (c_int32, c_int32)),
    "dense_matvec": (
        c_int32,
        (c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int32, c_void_p, c_void_p, c_int32),
    ),
}
LIBRARY = KernelLibrary(
    "CPU kernel of dense weights",
    ("dense.c", "rows.h", "rows_x86.h", "avx.h", "floats.h", "share.h", "team.h"),
    SIGNATURES,
)
BF16, FP32 = torch.bfloat16, torch.float32
WIDTHS = (3072, 8192)  # the more columns, the sooner several rows of x push each other out of the L1 cache
ROWS = {  # kernel, dtype → up to how many rows of x it beats torch on Zen 5, for weights of up to WIDTHS columns and wider
    ("avx512-bf16", BF16): (8, 4, 2),
    ("avx512", BF16): (4, 2, 1),
    ("avx512", FP32): (16, 6, 4),
    ("avx2", BF16): (4, 2, 1),
    ("avx2", FP32): (16, 6, 4),
    ("portable", BF16): (0, 0, 0),
    ("portable", FP32): (0, 0, 0),
}


def why_not() -> str | None:
    """Why the kernel cannot run here, in one line; None if it can. Builds it at the first call."""
    return LIBRARY.why_not()


@cache
def kernels(dtype: torch.dtype) -> dict[str, int]:
    """Name → number of the kernels that this CPU can run on weights of `dtype`, the fastest first.

    RecipeError for any other dtype than bfloat16 and float32, MachineError where there is no kernel (`why_not`).
    """
    if dtype not in DTYPES:
        raise RecipeError(f"the CPU kernel of dense weights takes bfloat16 or float32, not {dtype}")
    return LIBRARY.fitting(DTYPES[dtype])


@cache
def kernel_rows(dtype: torch.dtype, width: int) -> int:
    """Up to how many rows of x (…, width) `matvec` takes less time on this CPU than torch; 0 where it never does."""
    return ROWS[next(iter(kernels(dtype))), dtype][bisect_left(WIDTHS, width)]


def matvec(weight: Tensor, x: Tensor, bias: Tensor | None = None, *, kernel: str | None = None) -> Tensor:
    """x (..., in) · weight (out, in)ᵀ + bias (out,) → (..., out), all of one dtype, accumulated in float32.

    No gradient flows. `kernel` takes a name of `kernels()` in place of the fastest. ValueError for what does not fit.
    """
    out, width = weight.shape
    tensors = (weight, x) if bias is None else (weight, x, bias)
    if x.shape[-1:] != (width,) or not x.numel() or (bias is not None and bias.shape != (out,)):
        raise ValueError(f"x is {list(x.shape)}, wanted (..., {width}) with at least one row, bias [{out}] or none")
    if any(tensor.dtype != weight.dtype or tensor.device.type != "cpu" for tensor in tensors):
        found = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
        raise ValueError(f"weight, x and bias are {found}, wanted one dtype on the cpu")
    numbers = kernels(weight.dtype)
    number = numbers[kernel] if kernel else next(iter(numbers.values()))
    weight, x, bias = weight.contiguous(), x.contiguous(), bias if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype)
    status = LIBRARY.loaded().dense_matvec(
        weight.data_ptr(), out, width, number, x.data_ptr(), x.numel() // width,
        None if bias is None else bias.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise MemoryError
    return y
