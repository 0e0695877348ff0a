"""Backend "bitmask": an unstructured weight kept as one bit a place and its values, multiplied by at most 32 tokens.

`prepare` or `from_neutral` at load, `linear` for every call, `restore` to save. The fewest bytes of all layouts, and
not the fastest: see `bitmask_gemv` for what decoding costs. More tokens than 32 are for a dense copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_ops.bitmask_gemm import MAX_TOKENS, bitmask_gemm
from triton_ops.bitmask_gemv import bitmask_gemv
from triton_ops.bitmask_layout import BitmaskWeight, from_neutral, keep, prepare, restore
from triton_ops.machine import why_no_triton

__all__ = ["BitmaskWeight", "from_neutral", "keep", "linear", "prepare", "restore", "why_not"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, m: int) -> str | None:
    """Why a weight (N, K) cannot multiply `m` tokens here, in a few words; None where it can."""
    if dtype not in DTYPES:
        return f"needs fp16, bf16 or fp32, got {dtype}"
    if not 1 <= m <= MAX_TOKENS:
        return f"at most {MAX_TOKENS} tokens, got {m}"
    return why_no_triton(device)


def linear(x: Tensor, prepared: BitmaskWeight, bias: Tensor | None = None) -> Tensor:
    """x (M, K) with M ≤ 32, in the dtype of the weight; bias (N,) or None → (M, N) in that dtype, the same every run.
    ValueError where `why_not` has a reason or x does not fit the weight."""
    m, k = x.shape
    problem = why_not(prepared.shape, x.dtype, x.device, m)
    if k != prepared.shape[1] or x.dtype != prepared.values.dtype:
        problem = f"x is {x.dtype} (M, {k}), the weight {prepared.values.dtype} (N, {prepared.shape[1]})"
    if problem:
        raise ValueError(f"bitmask: {problem}")
    multiply = bitmask_gemv if m == 1 else bitmask_gemm
    return multiply(x, prepared.values, prepared.words, prepared.starts, bias)
