"""The second pass of a kernel whose programs share the inputs of a row: their sums added, in a fixed order.

No atomics: the same numbers give the same bits, whichever program ends first.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_parts_kernel(parts, bias, y, M, N, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (part * M + token) * N + row, mask=row < N, other=0.0)
    if BIAS:
        total += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(y + token * N + row, total.to(y.dtype.element_ty), mask=row < N)


def add_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """parts float32 (P, M, N), bias (N,) → y (M, N): their sum over P, rounded once."""
    count, m, n = parts.shape
    add_parts_kernel[(triton.cdiv(n, 512), m)](
        parts,
        y if bias is None else bias,
        y,
        m,
        n,
        PARTS=count,
        BIAS=bias is not None,
        BLOCK=512,
        enable_fp_fusion=True,
    )


def parts_for(x: Tensor, n: int, count: int) -> Tensor:
    """The workspace: float32 (P, M, N)."""
    return x.new_empty(count, x.shape[0], n, dtype=torch.float32)
