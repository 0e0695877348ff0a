"""y = W·x for one token and an unstructured weight in the bitmask layout; fp16, bf16 and fp32, fp32 accumulation.

A program takes eight rows and a run of 256-column chunks. Lanes run along a row: eight lanes share a mask word, each
takes four columns and finds its values by counting the bits before them, so neighbouring lanes load neighbouring
values. Where there are few rows, K is split over programs and the parts are added in order (`splitk`).

Decoding costs about 16 instructions a weight (SASS of the loop, sm_90), zeros included, which is more than an H200 can
issue at full bandwidth: this saves memory, and is a speed-up only where a benchmark on the device says so. Compiled
for sm_80, sm_90 and sm_100 without spills and run in the interpreter; it has not run on hardware.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.bitmask_decode import four_columns, popcount
from triton_ops.bitmask_layout import CHUNK
from triton_ops.requirements import PTX
from triton_ops.splitk import add_parts, parts_for

ROWS = 8  # a program's; 16 needs 79 registers and 4 saves nothing
PROGRAMS = 1024  # wanted at least: six to a multiprocessor on the largest GPU


@torch.library.custom_op("triton_ops::bitmask_gemv", mutates_args=())
def bitmask_gemv(x: Tensor, values: Tensor, words: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    """x (1, K), a weight (N, K) as `BitmaskWeight` holds it, bias (N,) → (1, N) in x's dtype. `values` has that dtype."""
    n, chunks = starts.shape
    k = x.shape[1]
    each = chunks_each(triton.cdiv(n, ROWS), chunks)
    split = max(1, triton.cdiv(chunks, each))
    y = x.new_empty(1, n)
    sums = parts_for(x, n, split) if split > 1 else y
    if y.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            gemv_kernel[(triton.cdiv(n, ROWS), split)](
                values, words, starts, x.contiguous(), bias, sums, n, k, chunks, each,
                CHUNK=CHUNK, ROWS=ROWS, SPLIT=split > 1, PTX=PTX, enable_fp_fusion=True,
            )  # fmt: skip
            if split > 1:
                add_parts(sums, bias, y)
    return y


@bitmask_gemv.register_fake
def _(x: Tensor, values: Tensor, words: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(1, words.shape[0])


def chunks_each(programs: int, chunks: int) -> int:
    """Chunks that a program takes when `programs` of them cover the rows: from the shape alone, so that a result does
    not depend on the device."""
    split = min(max(1, triton.cdiv(PROGRAMS, max(programs, 1))), max(chunks, 1))
    return max(1, triton.cdiv(chunks, split))


@triton.jit
def gemv_kernel(values, words, starts, x, bias, out, n, k, chunks, chunks_each,
                CHUNK: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    WORDS: tl.constexpr = CHUNK // 32
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    inside = row < n
    word = tl.arange(0, WORDS)
    words_of = words + row.to(tl.int64)[:, None] * (chunks * WORDS) + word[None, :]
    starts_of = starts + row.to(tl.int64) * chunks
    total = tl.zeros([ROWS, WORDS, 8], tl.float32)
    for chunk in range(part * chunks_each, tl.minimum((part + 1) * chunks_each, chunks)):
        mask = tl.load(words_of + chunk * WORDS, mask=inside[:, None], other=0)
        first = values + tl.load(starts_of + chunk, mask=inside, other=0)
        kept = popcount(mask, PTX)
        weight0, weight1, weight2, weight3 = four_columns(first, mask, tl.cumsum(kept, 1) - kept, PTX)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        inputs = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(inputs, [WORDS, 8, 2, 2]))  # (WORDS, 8, 2)
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        total += weight0.to(tl.float32) * x0[None]  # one term a line: each becomes one fused multiply-add
        total += weight1.to(tl.float32) * x1[None]
        total += weight2.to(tl.float32) * x2[None]
        total += weight3.to(tl.float32) * x3[None]
    y = tl.sum(tl.sum(total, 2), 1)
    if not SPLIT and bias is not None:
        y += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + part.to(tl.int64) * n + row, y, mask=inside)
