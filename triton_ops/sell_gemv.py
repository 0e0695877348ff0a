"""y = x·Wᵀ for one to four tokens and an unstructured weight in the sell layout; fp16 and bf16, fp32 accumulation.

A thread owns a row of a segment: it loads eight values (16 bytes) and their gaps (4 bytes), adds the gaps up and
fetches x, which lies side by side for all tokens. The threads of a warp walk through the same segment at about the same
pace, so what they fetch shares cache lines. Segments are added up in order (`splitk`). A pruned place is never
multiplied, so an infinite x does not make it NaN.

Instructions in the loop (SASS, bf16, sm_90): 11 an entry for one token, 13 for two, 18 for four. At 70 % sparsity that is
3.5 a weight for one token, where `bitmask_gemv` needs 16 and an H200 has time for about 6 at full bandwidth. For one
token the weights of two iterations ahead are under way (asynchronous copies); for more, those of one or two in registers.
Compiled for sm_80, sm_90 and sm_100 without spills and run in the interpreter; it has not run on hardware.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.halves import high, low
from triton_ops.sell_layout import ROWS, STEP
from triton_ops.splitk import add_parts, parts_for

MAX_TOKENS = 4


@torch.library.custom_op("triton_ops::sell_gemv", mutates_args=())
def sell_gemv(
    x: Tensor, values: Tensor, gaps: Tensor, slices: Tensor, order: Tensor, n: int, segment: int, bias: Tensor | None
) -> Tensor:
    """x (M, K) with 1 ≤ M ≤ 4, a weight (N, K) as `SellWeight` holds it, bias (N,) → (M, N) in x's dtype, which is that
    of `values`."""
    m, k = x.shape
    parts = max(1, triton.cdiv(k, segment))
    count = max(1, triton.cdiv(n, ROWS))
    y = x.new_empty(m, n)
    sums = parts_for(x, n, parts) if parts > 1 else y
    if y.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            gemv_kernel[(count, parts)](
                values.view(torch.int32), gaps, slices, order, side_by_side(x), bias, sums, m, n, segment, count,
                ROWS=ROWS, STEP=STEP, BF16=x.dtype == torch.bfloat16, **plan(m),
                SPLIT=parts > 1, enable_fp_fusion=True,
            )  # fmt: skip
            if parts > 1:
                add_parts(sums, bias, y)
    return y


@sell_gemv.register_fake
def _(
    x: Tensor, values: Tensor, gaps: Tensor, slices: Tensor, order: Tensor, n: int, segment: int, bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], n)


def plan(m: int) -> dict[str, int]:
    """Tokens that a program computes; steps of an iteration; iterations whose weights are copied ahead, and steps that are
    held ahead in registers: beyond one token, copying would take x through shared memory too."""
    return {1: dict(TOKENS=1, UNROLL=2, STAGES=3, AHEAD=0), 2: dict(TOKENS=2, UNROLL=2, STAGES=1, AHEAD=4)}.get(
        m, dict(TOKENS=4, UNROLL=1, STAGES=1, AHEAD=2)
    )


def side_by_side(x: Tensor) -> Tensor:
    """x (M, K) of 16-bit floats → (K,) integers of 16, 32 or 64 bits: 1, 2 or 4 tokens of a column, the first lowest."""
    m, k = x.shape
    if m == 1:
        return x.contiguous().view(torch.int16).view(k)
    tokens = 2 if m == 2 else 4
    columns = x.new_zeros(k, tokens)
    columns[:, :m] = x.T
    return columns.view(torch.int32 if tokens == 2 else torch.int64).view(k)


@triton.jit
def gemv_kernel(values, gaps, slices, order, x, bias, out, m, n, segment, count,
                ROWS: tl.constexpr, STEP: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
                TOKENS: tl.constexpr, BF16: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    PAIRS: tl.constexpr = STEP // 2  # two values are read as one int32
    part = tl.program_id(1)
    piece = part * count + tl.program_id(0)
    thread = tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    x_at = x + part * segment + tl.zeros([ROWS], tl.int32)  # of each row's last entry
    total0 = tl.zeros([ROWS, PAIRS], tl.float32)
    total1 = tl.zeros([ROWS, PAIRS], tl.float32)
    total2 = tl.zeros([ROWS, PAIRS], tl.float32)
    total3 = tl.zeros([ROWS, PAIRS], tl.float32)
    begin, end = tl.load(slices + piece), tl.load(slices + piece + 1)
    held = load_steps(values, gaps, begin, end, thread, pair, ROWS, AHEAD)
    for step in tl.range(begin, end, UNROLL, num_stages=STAGES):
        read = held + load_steps(values, gaps, step + AHEAD, end, thread, pair, ROWS, UNROLL)
        held = ()
        for place in tl.static_range(2 * UNROLL, 2 * UNROLL + 2 * AHEAD):
            held = held + (read[place],)  # noqa: RUF005 (Triton knows no unpacking)
        for now in tl.static_range(UNROLL):
            gap, words = read[2 * now], read[2 * now + 1]
            to_first, to_second, to_last = running_sums(gap, pair)  # (ROWS, PAIRS) twice, (ROWS,)
            x_first = tl.load(x_at[:, None] + to_first)
            x_second = tl.load(x_at[:, None] + to_second)
            x_at += to_last
            first, second = low(words, BF16), high(words, BF16)
            total0 += first * token(x_first, 0, BF16)  # one term a line: each becomes one fused multiply-add
            total0 += second * token(x_second, 0, BF16)
            if TOKENS > 1:
                total1 += first * token(x_first, 1, BF16)
                total1 += second * token(x_second, 1, BF16)
            if TOKENS > 2:
                total2 += first * token(x_first, 2, BF16)
                total2 += second * token(x_second, 2, BF16)
                total3 += first * token(x_first, 3, BF16)
                total3 += second * token(x_second, 3, BF16)
    row = tl.load(order + piece.to(tl.int64) * ROWS + thread)
    inside = row < n
    to = out + part.to(tl.int64) * m * n + row  # of token 0
    shift = tl.zeros([ROWS], tl.float32)
    if not SPLIT and bias is not None:
        shift = tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, tl.sum(total0, 1) + shift, mask=inside)
    if TOKENS > 1:
        tl.store(to + n, tl.sum(total1, 1) + shift, mask=inside)
    if TOKENS > 2:
        tl.store(to + 2 * n, tl.sum(total2, 1) + shift, mask=inside)
        tl.store(to + 3 * n, tl.sum(total3, 1) + shift, mask=row < n * (m - 3))  # nowhere for three tokens


@triton.jit
def load_steps(values, gaps, step, end, thread, pair, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Gaps (ROWS,) and values (ROWS, PAIRS) of the steps `step` … `step + COUNT - 1` in turns; 0 from `end` on."""
    read = ()
    for ahead in tl.static_range(COUNT):
        at = ((step + ahead) * ROWS + thread).to(tl.int64)
        there = at < end * ROWS
        gap = tl.load(gaps + at, mask=there, other=0)
        words = tl.load(values + at[:, None] * pair.shape[0] + pair[None, :], mask=there[:, None], other=0)
        read = read + (gap, words)  # noqa: RUF005
    return read


@triton.jit
def running_sums(gap, pair):
    """Eight nibbles of each int32 (ROWS,) → their sums up to and with each: of places 0, 2, 4, 6 and of 1, 3, 5, 7, both
    int32 (ROWS, 4), and of all, (ROWS,).

    Multiplying by 0x01010101 adds to each byte all bytes below it. A sum is at most 8 · 15 and fits its byte.
    """
    even = (gap & 0x0F0F0F0F) * 0x01010101
    odd = ((gap >> 4) & 0x0F0F0F0F) * 0x01010101
    to_first, to_second = even + (odd << 8), even + odd
    shift = 8 * pair[None, :]
    return (to_first[:, None] >> shift) & 255, (to_second[:, None] >> shift) & 255, (to_second >> 24) & 255


@triton.jit
def token(packed, which: tl.constexpr, BF16: tl.constexpr):
    """The 16-bit float of one token, out of those that lie side by side in an integer, as fp32."""
    return low((packed >> (16 * which)).to(tl.int32), BF16)
