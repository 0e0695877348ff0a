"""Backend "sell": an unstructured weight as rows of values and 4-bit gaps, multiplied by at most four tokens.

`prepare` or `from_neutral` at load, `linear` for every call, `restore` to save. A twentieth more bytes than `bitmask` at
70 % sparsity, for a quarter of its instructions: the layout for decoding one sequence. More tokens are for another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_ops import bitmask_layout
from triton_ops.machine import why_no_triton
from triton_ops.sell_gemv import MAX_TOKENS, sell_gemv
from triton_ops.sell_layout import SellWeight, prepare, restore

__all__ = ["SellWeight", "from_neutral", "linear", "prepare", "restore", "why_not"]

DTYPES = (torch.float16, torch.bfloat16)


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, m: int) -> str | None:
    """Why a weight (N, K) cannot multiply `m` tokens here, in a few words; None where it can."""
    if dtype not in DTYPES:
        return f"needs fp16 or bf16, got {dtype}"
    if not 1 <= m <= MAX_TOKENS:
        return f"at most {MAX_TOKENS} tokens, got {m}"
    return why_no_triton(device)


def from_neutral(values: Tensor, mask: Tensor, offsets: Tensor | None, shape: tuple[int, int]) -> SellWeight:
    """Lay out the arch-neutral form (see `bitmask_layout.from_neutral`), through one dense copy on the same device."""
    return prepare(bitmask_layout.restore(bitmask_layout.from_neutral(values, mask, offsets, shape)))


def linear(x: Tensor, prepared: SellWeight, bias: Tensor | None = None) -> Tensor:
    """x (M, K) with M ≤ 4, in the dtype of the weight; bias (N,) or None → (M, N) in that dtype, the same every run.
    ValueError where `why_not` has a reason or x does not fit the weight."""
    (m, k), (n, wanted) = x.shape, prepared.shape
    problem = why_not(prepared.shape, x.dtype, x.device, m)
    if k != wanted or x.dtype != prepared.values.dtype:
        problem = f"x is {x.dtype} (M, {k}), the weight {prepared.values.dtype} (N, {wanted})"
    if problem:
        raise ValueError(f"sell: {problem}")
    return sell_gemv(x, prepared.values, prepared.gaps, prepared.slices, prepared.order, n, prepared.segment, bias)
