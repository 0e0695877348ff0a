"""RMSNorm on the CPU in one pass of a C kernel, where torch makes six tensors. The result does not depend on the number of
threads, which is torch's."""

from __future__ import annotations

from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor, get_num_threads

from llmsparse.backends.cpu.kernel_library import KernelLibrary
from llmsparse.backends.cpu.library import DTYPES
from llmsparse.errors import RecipeError

SIGNATURES = {
    "kernel_name": (c_char_p, (c_int32,)),
    "kernel_fits": (c_int32, (c_int32, c_int32)),
    "rms_norm": (None, (c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int32)),
}
LIBRARY = KernelLibrary("CPU kernel of norms", ("norm.c", "lanes.h", "avx.h", "floats.h", "team.h"), SIGNATURES)


def why_not() -> str | None:
    """Why the kernel cannot run here, in one line; None if it can. Builds it at the first call."""
    return LIBRARY.why_not()


@cache
def kernels(dtype: torch.dtype) -> dict[str, int]:
    """Name → number of the kernels that this CPU can run on tensors of `dtype`, the fastest first.

    RecipeError for any other dtype than bfloat16 and float32, MachineError where there is no kernel (`why_not`).
    """
    if dtype not in DTYPES:
        raise RecipeError(f"the CPU kernel of norms takes bfloat16 or float32, not {dtype}")
    return LIBRARY.fitting(DTYPES[dtype])


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, kernel: str | None = None) -> Tensor:
    """weight ∘ x / √(mean x² + eps): x (..., width), weight (width,), of one dtype → (..., width).

    The quotient is rounded to the dtype before it is multiplied. No gradient flows. ValueError for what does not fit.
    """
    width = weight.shape[0]
    if x.shape[-1:] != weight.shape or x.dtype != weight.dtype or not (x.is_cpu and weight.is_cpu):
        found = ", ".join(f"{list(one.shape)} {one.dtype} on {one.device}" for one in (x, weight))
        raise ValueError(f"x and weight are {found}, wanted (..., width) and (width,) of one dtype on the cpu")
    numbers = kernels(x.dtype)
    number = numbers[kernel] if kernel else next(iter(numbers.values()))
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // width if width else 0
    LIBRARY.loaded().rms_norm(
        number, x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, width, eps, get_num_threads()
    )
    return y
