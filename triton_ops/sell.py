"""Backend "sell": an unstructured weight as rows of values and 4-bit gaps, multiplied by at most four tokens.

`prepare` or `from_neutral` at load, `linear` for every call, `restore` to save. A tenth more bytes than `bitmask` at 70 %
sparsity, for a quarter of its instructions: the layout for decoding one sequence. More tokens are for another.
"""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor

from triton_ops import bitmask_layout
from triton_ops.requirements import check, unmet
from triton_ops.sell_gemv import MAX_TOKENS, sell_gemv
from triton_ops.sell_layout import SellWeight, prepare, restore

__all__ = ["SellWeight", "from_neutral", "linear", "prepare", "restore", "why_not"]

NAME = "sell"


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, m: int) -> str | None:
    """Why a weight of this shape (N, K) cannot be multiplied here for M tokens, or None."""
    return unmet(NAME, shape, dtype, device, m, most=MAX_TOKENS, multiple=1)


def from_neutral(values: Tensor, mask: Tensor, offsets: Tensor | None, shape: tuple[int, int]) -> SellWeight:
    """Lay out the arch-neutral form (see `bitmask_layout.from_neutral`), through one dense copy on the same device."""
    return prepare(bitmask_layout.restore(bitmask_layout.from_neutral(values, mask, offsets, shape)))


def linear(x: Tensor, prepared: SellWeight, bias: Tensor | None = None) -> Tensor:
    """x (M, K) with M ≤ 4, in the dtype of the weight; bias (N,) or None → (M, N) in that dtype, the same every run.
    ValueError where dtypes, shapes or device do not fit. Safe in a CUDA graph."""
    check(NAME, x, prepared.shape, prepared.values.dtype, bias, most=MAX_TOKENS)
    stored = (prepared.values, prepared.gaps, prepared.slices, prepared.order)
    return sell_gemv(x, *stored, prepared.shape[0], prepared.segment, bias)
