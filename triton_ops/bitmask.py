"""Backend "bitmask": an unstructured weight kept as one bit a place and its values, multiplied by at most 32 tokens.

`prepare` or `from_neutral` at load, `linear` for every call, `restore` to save. The fewest bytes of all layouts, and
not the fastest: see `bitmask_gemv` for what decoding costs. More tokens than 32 are for a dense copy.
"""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor

from triton_ops.bitmask_gemm import MAX_TOKENS, bitmask_gemm
from triton_ops.bitmask_gemv import bitmask_gemv
from triton_ops.bitmask_layout import BitmaskWeight, from_neutral, keep, prepare, restore
from triton_ops.requirements import check, unmet

__all__ = ["BitmaskWeight", "from_neutral", "keep", "linear", "prepare", "restore", "why_not"]

NAME = "bitmask"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, m: int) -> str | None:
    """Why a weight of this shape (N, K) cannot be multiplied here for M tokens, or None."""
    return unmet(NAME, shape, dtype, device, m, most=MAX_TOKENS, dtypes=DTYPES, multiple=1)


def linear(x: Tensor, prepared: BitmaskWeight, bias: Tensor | None = None) -> Tensor:
    """x (M, K) with M ≤ 32, in the dtype of the weight; bias (N,) or None → (M, N) in that dtype, the same every run.
    ValueError where dtypes, shapes or device do not fit. Safe in a CUDA graph."""
    check(NAME, x, prepared.shape, prepared.values.dtype, bias, most=MAX_TOKENS)
    multiply = bitmask_gemv if len(x) == 1 else bitmask_gemm
    return multiply(x, prepared.values, prepared.words, prepared.starts, bias)
