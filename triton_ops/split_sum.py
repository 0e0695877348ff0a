"""Second pass of a split-K product: partial sums are added in the order of their parts, so a result is the same every run.

Atomics would save the launch and make the last bits depend on which program finished first.
"""

# pyright: basic
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 256


def split_sum(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σ over the first dimension, plus bias: parts (S, M, N) fp32 contiguous, bias (N,) or None → (M, N) in `dtype`."""
    count, m, n = parts.shape
    y = torch.empty(m, n, dtype=dtype, device=parts.device)
    if y.numel():
        with torch.cuda.device_of(y):  # Triton launches on the current device
            split_sum_kernel[(triton.cdiv(n, COLUMNS), m)](parts, bias, y, count, m, n, COLUMNS=COLUMNS)
    return y


@triton.jit
def split_sum_kernel(parts, bias, y, count, m, n, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1).to(tl.int64)
    inside = column < n
    total = tl.zeros([COLUMNS], tl.float32)
    for part in range(0, count):
        total += tl.load(parts + (part * m + token) * n + column, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * n + column, total, mask=inside)
