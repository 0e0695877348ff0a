"""2:4 for one token, portable: instead of unpacking the weight, pick from x.

Four inputs of x are one int64, and the two places of a group say by how much to shift it: five to six instructions a
weight, on any GPU that Triton compiles for. x (1, K) times a weight in row order (pack24.py). What the next two turns of
the loop read is under way while one is computed (asynchronous copies).

On hardware: never run. Compiled, and run in Triton's interpreter.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.halves import high, low
from triton_ops.pack24 import BITS_PER_WEIGHT, Rows24, pack_rows, unpack_rows
from triton_ops.requirements import aligned, check, unmet
from triton_ops.splitk import add_parts, parts_for

NAME = "select24"
MOST_TOKENS = 1
ROWS, WORDS, WARPS = 8, 16, 4  # a program's rows, and int32 of places (32 inputs each) that it reads at a time
WARPS_WANTED = 2048
bits_per_weight = BITS_PER_WEIGHT


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, m: int) -> str | None:
    """Why a weight of this shape (N, K) cannot be multiplied here for M tokens, or None."""
    return unmet(NAME, shape, dtype, device, m, most=MOST_TOKENS)


def prepare(weight: Tensor, keep: Tensor | None = None) -> Rows24:
    """(N, K) fp16 or bf16 with zeros → rows, on the weight's device. Errors as for `pack_rows`."""
    return pack_rows(weight, keep)


def restore(packed: Rows24) -> Tensor:
    """The weight that `prepare` was given, (N, K), to the bit."""
    return unpack_rows(packed)


def linear(x: Tensor, packed: Rows24, bias: Tensor | None = None) -> Tensor:
    """x (1, K), bias (N,) → (1, N) in x's dtype, summed in float32. ValueError where dtypes, shapes or device do not
    fit. Safe in a CUDA graph: two launches at most, and memory only from torch's allocator."""
    check(NAME, x, packed.shape, packed.dtype, bias, most=MOST_TOKENS)
    return select24(x, packed.pairs, packed.places, bias)


@torch.library.custom_op("triton_ops::select24", mutates_args=())
def select24(x: Tensor, pairs: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    (n, words), k = places.shape, x.shape[1]
    y = x.new_empty(x.shape[0], n)
    if not len(y):
        return y
    programs = triton.cdiv(n, ROWS)
    count = max(min(WARPS_WANTED // (programs * WARPS), words // WORDS), 1)
    parts = parts_for(x, n, count) if count > 1 else None
    with torch.cuda.device_of(x):  # Triton launches on the current device
        select24_kernel[(programs, count)](
            aligned(x),
            pairs,
            places,
            y if bias is None else bias,
            y if parts is None else parts,
            n,
            k,
            words,
            count,
            ROWS=ROWS,
            WORDS=WORDS,
            FINISHED=parts is None,
            BIAS=bias is not None and parts is None,
            BF16=x.dtype == torch.bfloat16,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        if parts is not None:
            add_parts(parts, bias, y)
    return y


@select24.register_fake
def _(x: Tensor, pairs: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], places.shape[0])


@triton.jit
def select24_kernel(
    x,
    pairs,
    places,
    bias,
    y,
    N,
    K,
    words,
    parts,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    FINISHED: tl.constexpr,
    BIAS: tl.constexpr,
    BF16: tl.constexpr,
):
    row, part = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    row64 = row.to(tl.int64)
    fours = x.to(tl.pointer_type(tl.int64))  # the inputs of a group
    eight = tl.arange(0, 8)
    total = tl.zeros([ROWS, WORDS, 8], tl.float32)
    for start in tl.range(part * WORDS, words, parts * WORDS, num_stages=3):
        word = start + tl.arange(0, WORDS)
        live = (row < N)[:, None] & (word < words)[None, :]  # (ROWS, WORDS)
        nibbles = tl.load(
            places + row64[:, None] * words + word[None, :], mask=live, other=0, eviction_policy="evict_first"
        )
        group = word[:, None] * 8 + eight[None, :]  # (WORDS, 8)
        pair = tl.load(
            pairs + row64[:, None, None] * (words * 8) + group[None, :, :],
            mask=live[:, :, None],
            other=0,
            eviction_policy="evict_first",
        )  # (ROWS, WORDS, 8)
        four = tl.load(fours + group, mask=group < K // 4, other=0)[None, :, :]
        nibble = nibbles[:, :, None] >> (4 * eight)[None, None, :]
        first = (four >> (16 * (nibble & 3)).to(tl.int64)).to(tl.int32)
        second = (four >> (16 * ((nibble >> 2) & 3)).to(tl.int64)).to(tl.int32)
        total += low(pair, BF16) * low(first, BF16)
        total += high(pair, BF16) * low(second, BF16)
    result = tl.sum(tl.sum(total, 2), 1)
    if BIAS:
        result += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    if not FINISHED:
        y += part.to(tl.int64) * N
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < N)
