"""y = Σ_k share · D_e (silu(G_e x) ∘ U_e x) for the experts e that one to eight tokens chose; fp16, bf16, fp32.

Two launches. The first makes the inner values of every pair of a token and an expert, share included, in fp32; the second
adds up a token's experts in the order of its choices, so the same numbers give the same bits, and no atomics. Only rows of
experts that were chosen are loaded, 16 bytes at a time; programs for the same rows of several pairs stand side by side in
the grid, so that an expert that several tokens chose comes from memory once and from the L2 cache after that. Nothing is
read back by the host: the launches are the same whatever was chosen, and go into a CUDA graph. The weights of the next
two or three turns of a loop are under way while one is computed, about 4 KB a warp (asynchronous copies).

Compiled for sm_80, sm_90 and sm_100 without spills and run in the interpreter; it has not run on hardware.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.requirements import INTERPRETED

MAX_TOKENS = 8
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ENTER_ROWS = 4  # a program's, of gate and of up
LEAVE_ROWS = 8  # of down: loads are as many, and as wide, as in the first launch


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot run on weights of `dtype` on `device`, in a line, or None."""
    if dtype not in DTYPES:
        return f"expert_gemv takes float16, bfloat16 or float32, got {dtype}"
    if device.type != "cuda":
        return f"expert_gemv needs a CUDA device, got {device.type}"
    return None


def experts(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    """x (T, D) with 1 ≤ T ≤ 8, gate and up (E, N, D), down (E, D, N), index int64 and shares (T, K) → (T, D) in x's dtype,
    which is the weights'. gate and up may be parts of one tensor. An index that is no expert adds nothing. ValueError for
    what does not fit."""
    count, inner, width = gate.shape
    if up.shape != gate.shape or down.shape != (count, width, inner) or x.ndim != 2 or x.shape[1] != width:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, gate, up, down))
        raise ValueError(f"expert_gemv: x, gate, up and down are {shapes}; wanted (T, D), (E, N, D) twice, (E, D, N)")
    if index.shape != shares.shape or index.ndim != 2 or len(index) != len(x) or not 1 <= len(x) <= MAX_TOKENS:
        shapes = f"index is {tuple(index.shape)}, shares {tuple(shares.shape)}"
        raise ValueError(f"expert_gemv: {shapes}; wanted (T, K) for the {len(x)} tokens of x, at most {MAX_TOKENS}")
    if {gate.dtype, up.dtype, down.dtype} != {x.dtype}:
        raise ValueError(f"expert_gemv: x is {x.dtype}, the weights {gate.dtype}, {up.dtype} and {down.dtype}")
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError("expert_gemv needs a CUDA device, x is on the CPU")
    return expert_gemv(x, *map(rows_in_order, (gate, up, down)), index, shares)


def rows_in_order(weight: Tensor) -> Tensor:
    """(E, rows, columns), copied where the rows of an expert do not lie one behind the other."""
    return weight if weight.stride()[1:] == (weight.shape[2], 1) else weight.contiguous()


@torch.library.custom_op("triton_ops::expert_gemv", mutates_args=())
def expert_gemv(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    """As `experts`; each expert's rows lie one behind the other."""
    (tokens, width), (count, inner, _), k = x.shape, gate.shape, index.shape[1]
    y = x.new_empty(tokens, width)
    if not y.numel():
        return y
    x, index, shares = x.contiguous(), index.contiguous(), shares.contiguous()
    h = x.new_empty(tokens * k, inner, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if h.numel():
            enter_kernel[(tokens * k, triton.cdiv(inner, ENTER_ROWS))](
                x, gate, up, index, shares, h, count, inner, width, k, gate.stride(0), up.stride(0),
                ROWS=ENTER_ROWS, COLUMNS=columns(width, x.element_size()), enable_fp_fusion=True,
            )  # fmt: skip
        leave_kernel[(tokens, triton.cdiv(width, LEAVE_ROWS))](
            h, down, index, y, count, inner, width, k, down.stride(0),
            ROWS=LEAVE_ROWS, COLUMNS=columns(0, x.element_size()), enable_fp_fusion=True,
        )  # fmt: skip
    return y


@expert_gemv.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def columns(width: int, size: int) -> int:
    """Of an iteration: a warp reads a row, 16 bytes a thread, and twice where the row is long."""
    once = 32 * 16 // size
    return 2 * once if width >= 4 * once else once


@triton.jit
def enter_kernel(x, gate, up, index, shares, h, count, inner, width, k, gate_step, up_step,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    pair = tl.program_id(0)
    expert = tl.load(index + pair)
    if (expert < 0) | (expert >= count):  # nobody reads its inner values either
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    gate_at = gate + expert.to(tl.int64) * gate_step + at
    up_at = up + expert.to(tl.int64) * up_step + at
    x_at = x + (pair // k).to(tl.int64) * width
    gates = tl.zeros([ROWS, COLUMNS], tl.float32)
    ups = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, width, COLUMNS, num_stages=3):  # what two further turns need is copied ahead
        there = first + column < width
        mask = (row < inner)[:, None] & there[None, :]
        xs = tl.load(x_at + first + column, mask=there, other=0.0).to(tl.float32)[None, :]
        gates += tl.load(gate_at + first, mask=mask, other=0.0).to(tl.float32) * xs
        ups += tl.load(up_at + first, mask=mask, other=0.0).to(tl.float32) * xs
    gated = tl.sum(gates, 1)
    share = tl.load(shares + pair).to(tl.float32)
    values = gated / (1.0 + tl.exp(-gated)) * tl.sum(ups, 1) * share
    tl.store(h + pair.to(tl.int64) * inner + row, values, mask=row < inner)


@triton.jit
def leave_kernel(h, down, index, y, count, inner, width, k, down_step, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * inner + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for choice in range(k):
        pair = token * k + choice
        expert = tl.load(index + pair)
        if (expert >= 0) & (expert < count):
            down_at = down + expert.to(tl.int64) * down_step + at
            h_at = h + pair.to(tl.int64) * inner
            for first in tl.range(0, inner, COLUMNS, num_stages=4):
                there = first + column < inner
                mask = (row < width)[:, None] & there[None, :]
                values = tl.load(h_at + first + column, mask=there, other=0.0)[None, :]
                total += tl.load(down_at + first, mask=mask, other=0.0).to(tl.float32) * values
    result = tl.sum(total, 1).to(y.dtype.element_ty)
    tl.store(y + token.to(tl.int64) * width + row, result, mask=row < width)
