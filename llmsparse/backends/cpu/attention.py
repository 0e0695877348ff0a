"""Attention of a few tokens over a cache of keys and values on the CPU, by a C kernel that reads each key and value once.

torch's own converts them anew for every query head, and takes ten times as long in bf16. The result depends neither on the number of
threads, which is torch's, nor on what else is in the batch.
"""

from __future__ import annotations

import ctypes
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
    "run_attention": (c_int32, (c_void_p, c_int32, c_int32)),
}
LIBRARY = KernelLibrary("CPU kernel of attention", ("attention.c", "avx.h", "floats.h", "team.h"), SIGNATURES)
FASTER = {torch.bfloat16: ("avx512", "avx2"), torch.float32: ("avx512",)}  # kernels that beat torch
NARROW = 32  # heads with fewer columns leave most of a vector empty
MASKS = {torch.bool: 1, torch.bfloat16: 2, torch.float32: 4}


class Strided(ctypes.Structure):
    """`struct tensor` of attention.c."""

    _fields_ = (
        ("at", c_void_p),
        ("batch", c_int64),
        ("heads", c_int64),
        ("tokens", c_int64),
        ("width", c_int64),
        ("batch_step", c_int64),
        ("head_step", c_int64),
        ("token_step", c_int64),
    )


class Attention(ctypes.Structure):
    """`struct attention` of attention.c."""

    _fields_ = (
        ("q", Strided),
        ("k", Strided),
        ("v", Strided),
        ("mask", c_void_p),
        ("mask_steps", c_int64 * 4),
        ("mask_dtype", c_int32),
        ("dtype", c_int32),
        ("scale", c_float),
        ("room", c_void_p),
        ("room_step", c_int64),
        ("y", c_void_p),
    )


def why_not() -> str | None:
    """Why the kernel cannot run here, in one line; None if it can. Builds it at the first call."""
    return LIBRARY.why_not()


@cache
def kernels(dtype: torch.dtype) -> dict[str, int]:
    """Name → number of the kernels that this CPU can run on tensors of `dtype`, the fastest first.

    RecipeError for any other dtype than bfloat16 and float32, MachineError where there is no kernel (`why_not`).
    """
    if dtype not in DTYPES:
        raise RecipeError(f"the CPU kernel of attention takes bfloat16 or float32, not {dtype}")
    return LIBRARY.fitting(DTYPES[dtype])


@cache
def usable(dtype: torch.dtype, width: int) -> bool:
    """Whether it takes less time on this CPU than torch's attention, for heads of so many columns (measured on Zen 5)."""
    if width < NARROW or dtype not in DTYPES or why_not() is not None:
        return False
    return next(iter(kernels(dtype))) in FASTER[dtype]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, kernel: str | None = None
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v: q (batch, heads, queries, width), k (batch, key heads, keys, width), v (batch, key
    heads, keys, value width), all of one dtype → (batch, queries, heads, value width).

    Query heads share key heads in their order. `mask` broadcasts to (batch, heads, queries, keys): True where to look, or
    what is added, in bfloat16 or float32; a query that may look at nothing gives zeros. No gradient flows. `kernel` takes a name
    of `kernels()` in place of the fastest. ValueError for what does not fit.
    """
    batch, heads, queries, width = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    fits = (
        k.shape == (batch, key_heads, keys, width)
        and v.shape[:3] == k.shape[:3]
        and key_heads
        and not heads % key_heads
    )
    if not fits or not keys or not (q.dtype == k.dtype == v.dtype) or not (q.is_cpu and k.is_cpu and v.is_cpu):
        found = ", ".join(f"{list(one.shape)} {one.dtype} on {one.device}" for one in (q, k, v))
        raise ValueError(f"q, k and v are {found}, wanted (batch, heads, tokens, width) of one dtype on the cpu")
    numbers = kernels(q.dtype)
    y = torch.empty((batch, queries, heads, v.shape[3]), dtype=q.dtype)
    if not y.numel():
        return y
    q, k, v = (one if one.stride(3) == 1 else one.contiguous() for one in (q, k, v))
    given = Attention(_strided(q), _strided(k), _strided(v), scale=scale, dtype=DTYPES[q.dtype], y=y.data_ptr())
    if mask is not None:
        if mask.dtype not in MASKS or not mask.is_cpu:
            raise ValueError(f"mask is {mask.dtype} on {mask.device}, wanted bool, bfloat16 or float32 on the cpu")
        mask = mask.expand(batch, heads, queries, keys)
        given.mask, given.mask_dtype, given.mask_steps = mask.data_ptr(), MASKS[mask.dtype], mask.stride()
    number = numbers[kernel] if kernel else next(iter(numbers.values()))
    if LIBRARY.loaded().run_attention(ctypes.byref(given), number, get_num_threads()):
        raise MemoryError
    return y


def _strided(tensor: Tensor) -> Strided:
    return Strided(tensor.data_ptr(), *tensor.shape, *tensor.stride()[:3])
