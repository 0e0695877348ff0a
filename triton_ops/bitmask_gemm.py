"""y = x·Wᵀ for up to 32 tokens and an unstructured weight in the bitmask layout, through `tl.dot`, fp32 accumulation.

A program takes 64 rows and a run of chunks, 64 columns at a time (fp32: 32): each tile is decoded to dense in
registers, by the same counting as in `bitmask_gemv`, and multiplied on the tensor cores. Tiles twice
as wide take 160 registers, in fp32 more than there are.

Decoding costs 12 to 14 instructions a weight (SASS of the loop, sm_90), for 1 token or for 32. Compiled for sm_80,
sm_90 and sm_100 without spills and run in the interpreter; it has not run on hardware.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.bitmask_decode import four_columns, popcount
from triton_ops.bitmask_gemv import chunks_each
from triton_ops.bitmask_layout import CHUNK
from triton_ops.requirements import INTERPRETED, PTX
from triton_ops.splitk import add_parts, parts_for

MAX_TOKENS = 32
ROWS = 64


@torch.library.custom_op("triton_ops::bitmask_gemm", mutates_args=())
def bitmask_gemm(x: Tensor, values: Tensor, words: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) with 1 ≤ M ≤ 32, a weight (N, K) as `BitmaskWeight` holds it, bias (N,) → (M, N) in x's dtype."""
    (m, k), (n, chunks) = x.shape, starts.shape
    each = chunks_each(triton.cdiv(n, ROWS), chunks)
    split = max(1, triton.cdiv(chunks, each))
    y = x.new_empty(m, n)
    sums = parts_for(x, n, split) if split > 1 else y
    if y.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            gemm_kernel[(triton.cdiv(n, ROWS), split)](
                values, words, starts, x.contiguous(), bias, sums, m, n, k, chunks, each,
                CHUNK=CHUNK, TILE=64 if x.element_size() == 2 else 32, ROWS=ROWS, TOKENS=16 if m <= 16 else 32,
                SPLIT=split > 1, INTERPRET=INTERPRETED, PTX=PTX, enable_fp_fusion=True,
            )  # fmt: skip
            if split > 1:
                add_parts(sums, bias, y)
    return y


@bitmask_gemm.register_fake
def _(x: Tensor, values: Tensor, words: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[0])


@triton.jit
def gemm_kernel(values, words, starts, x, bias, out, m, n, k, chunks, chunks_each,
                CHUNK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
                SPLIT: tl.constexpr, INTERPRET: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    WORDS: tl.constexpr = TILE // 32
    BITS: tl.constexpr = tl.int32 if values.dtype.element_ty == tl.float32 else tl.int16
    TILES: tl.constexpr = CHUNK // TILE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    inside = row < n
    word = tl.arange(0, WORDS)
    words_of = words + row.to(tl.int64)[:, None] * (chunks * CHUNK // 32) + word[None, :]
    begin = part * chunks_each
    first = values + tl.load(starts + row.to(tl.int64) * chunks + begin, mask=inside, other=0)
    before = tl.zeros([ROWS], tl.int32)  # kept values between `begin` and this tile
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for tile in range(begin * TILES, tl.minimum(begin + chunks_each, chunks) * TILES):
        mask = tl.load(words_of + tile * WORDS, mask=inside[:, None], other=0)
        kept = popcount(mask, PTX)
        weight0, weight1, weight2, weight3 = four_columns(first, mask, tl.cumsum(kept, 1) - kept + before[:, None], PTX)
        before += tl.sum(kept, 1)
        # reshaped as integers: Triton 3.6 would put a reshaped operand of `tl.dot` into shared memory in an illegal layout
        weight = tl.join(tl.join(weight0, weight2), tl.join(weight1, weight3)).to(BITS, bitcast=True)
        weight = tl.reshape(weight, [ROWS, TILE]).to(values.dtype.element_ty, bitcast=True)
        column = tile * TILE + tl.arange(0, TILE)
        xt = tl.load(x + token[None, :] * k + column[:, None],
                     mask=(token[None, :] < m) & (column[:, None] < k), other=0.0)  # fmt: skip
        if INTERPRET:  # there tl.dot multiplies the bit patterns of bf16
            weight = weight.to(tl.float32)
            xt = xt.to(tl.float32)
        total = tl.dot(weight, xt, total, input_precision="ieee")
    if not SPLIT and bias is not None:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(out + (part.to(tl.int64) * m + token[None, :]) * n + row[:, None], total,
             mask=inside[:, None] & (token[None, :] < m))  # fmt: skip
