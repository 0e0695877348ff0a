"""The C kernels for packed weights: what there is, what they take, and for how many tokens they pay."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from functools import cache

import torch

from llmsparse.backends.cpu.kernel_library import KernelLibrary
from llmsparse.backends.table import cpu_info
from llmsparse.errors import RecipeError

DTYPES = {torch.bfloat16: 2, torch.float32: 4}  # as enum { BF16, FP32 } of floats.h
ROWS, COLUMNS, SLACK = 4, 32, 32  # as in tiles.h
KERNEL_ROWS = {  # rows of x up to which a kernel beats unpacking for torch's product, at 50 % and above
    "avx512-bf16": 192,  # on Zen 4; the rest on Zen 4 and 5
    "avx512-vbmi2": 8,
    "avx512-fp32": 64,  # and here it still does at 64, the most that was measured
    "avx2": 2,
    "portable": 0,
}
BESIDE_COPY = {
    "avx512-bf16": 32
}  # ... and torch's product with a dense weight that is there, where that is fewer: on Zen 4
BESIDE_AMX = {
    "avx512-bf16": 48
}  # where torch multiplies in bf16 with AMX: the limit from before many tokens were, unmeasured


class Matrix(ctypes.Structure):
    """`struct weight` of tiles.h: one matrix in tiles."""

    _fields_ = (
        ("values", c_void_p),
        ("masks", c_void_p),
        ("starts", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("dtype", c_int32),
    )


class Target(ctypes.Structure):
    """`struct target` of bitmask.c: the bias of a weight, and where its product goes."""

    _fields_ = (("bias", c_void_p), ("y", c_void_p), ("bias_dtype", c_int32))


SIGNATURES = {
    "first_tile": (c_int64, (c_void_p, c_int64, c_int64, c_int64, c_int64)),
    "first_bad_row": (c_int64, (c_void_p, c_void_p, c_int64, c_int64, c_int64)),
    "repack": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_int32)),
    "restore": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_int32)),
    "load_stored": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
    "job_state": (c_int64, (c_void_p,)),
    "readers_open": (c_void_p, (c_int64, c_void_p, c_int64, c_int64)),
    "readers_submit": (None, (c_void_p, c_void_p)),
    "readers_hurry": (None, (c_void_p, c_void_p)),
    "readers_recall": (c_int32, (c_void_p, c_void_p)),
    "readers_finished": (c_int64, (c_void_p,)),
    "readers_wait": (None, (c_void_p, c_int64)),
    "readers_close": (None, (c_void_p,)),
    "readers_join": (None, (c_void_p,)),
    "readers_free": (None, (c_void_p,)),
    "kernel_name": (c_char_p, (c_int32,)),
    "kernel_fits": (c_int32, (c_int32, c_int32, c_int32)),
    "matvec": (c_int32, (c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_int32, c_int32, c_int32)),
    "expand": (None, (c_void_p, c_int32, c_void_p, c_int32)),
}


LIBRARY = KernelLibrary(
    "CPU kernels",
    ("bitmask.c", "tiles.h", "stored.h", "readers.h", "many.h", "x86.h", "avx.h", "floats.h", "team.h"),
    SIGNATURES,
)


def why_not() -> str | None:
    """Why the CPU kernels cannot run here, in one line; None if they can. Builds them at the first call."""
    return LIBRARY.why_not()


@cache
def library() -> ctypes.CDLL:
    """The library. MachineError with the reason where there is none."""
    return LIBRARY.loaded()


@cache
def kernels(dtype: torch.dtype, x_dtype: torch.dtype) -> dict[str, int]:
    """Name → number of the kernels that this CPU can run on a weight of `dtype` and x of `x_dtype`, the fastest first.

    RecipeError for any other dtype than bfloat16 and float32.
    """
    for name, given in (("weight", dtype), ("x", x_dtype)):
        if given not in DTYPES:
            raise RecipeError(f"the CPU kernels take a {name} of bfloat16 or float32, not {given}")
    return LIBRARY.fitting(DTYPES[dtype], DTYPES[x_dtype])


def kernel_rows(dtype: torch.dtype, x_dtype: torch.dtype) -> int:
    """Up to how many rows of x `matvec` takes less time on this CPU than `expand` and torch; 0 where it never does."""
    return rows_up_to(next(iter(kernels(dtype, x_dtype))), KERNEL_ROWS, BESIDE_AMX, amx=has_amx())


def rows_beside_copy(dtype: torch.dtype, x_dtype: torch.dtype) -> int:
    """Up to how many rows of x `matvec` takes less time than torch with a dense copy of the weight."""
    limit = kernel_rows(dtype, x_dtype)
    return min(limit, BESIDE_COPY.get(next(iter(kernels(dtype, x_dtype))), limit))


def rows_up_to(kernel: str, usual: Mapping[str, int], beside_amx: Mapping[str, int], *, amx: bool) -> int:
    """The limit of a kernel on a CPU with AMX in bf16 or without."""
    return beside_amx.get(kernel, usual[kernel]) if amx else usual[kernel]


@cache
def has_amx() -> bool:
    """Whether torch may multiply in bf16 with AMX here."""
    return any("amx_bf16" in line.split() for line in cpu_info() if line.startswith("flags"))
