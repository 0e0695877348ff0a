"""2:4 for any number of tokens, portable: a dense tile is put together in registers and multiplied by `tl.dot`.

x (M, K) times a weight in row order (pack24.py). Unpacking costs about eight instructions a weight, so that on GPUs with
much bandwidth for their clock it may gain nothing over dense; it is what runs where `mma24` cannot, and what `mma24` is
held against.

On hardware: never run. Compiled, and run in Triton's interpreter, where bf16 is multiplied as float32 because its
`tl.dot` multiplies the bit patterns.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.pack24 import BITS_PER_WEIGHT, Rows24, pack_rows, unpack_rows
from triton_ops.requirements import INTERPRETED, aligned, check, unmet
from triton_ops.splitk import add_parts, parts_for

NAME = "join24"
ROWS, WORDS, WARPS = 64, 4, 4  # a program's rows, and int32 of places (32 inputs each) that it unpacks at a time
FEWEST, MOST = 16, 64  # tokens of a tile: what `tl.dot` takes, and what the registers hold
WARPS_WANTED = 1024
bits_per_weight = BITS_PER_WEIGHT


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, m: int) -> str | None:
    """Why a weight of this shape (N, K) cannot be multiplied here for M tokens, or None."""
    return unmet(NAME, shape, dtype, device, m)


def prepare(weight: Tensor, keep: Tensor | None = None) -> Rows24:
    """(N, K) fp16 or bf16 with zeros → rows, on the weight's device. Errors as for `pack_rows`."""
    return pack_rows(weight, keep)


def restore(packed: Rows24) -> Tensor:
    """The weight that `prepare` was given, (N, K), to the bit."""
    return unpack_rows(packed)


def linear(x: Tensor, packed: Rows24, bias: Tensor | None = None) -> Tensor:
    """x (M, K), bias (N,) → (M, N) in x's dtype, summed in float32. ValueError where dtypes, shapes or device do not
    fit. Safe in a CUDA graph: two launches at most, and memory only from torch's allocator."""
    check(NAME, x, packed.shape, packed.dtype, bias)
    return join24(x, packed.pairs, packed.places, bias)


@torch.library.custom_op("triton_ops::join24", mutates_args=())
def join24(x: Tensor, pairs: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    (n, words), (m, k) = places.shape, x.shape
    y = x.new_empty(m, n)
    if not m:
        return y
    tokens = min(max(triton.next_power_of_2(m), FEWEST), MOST)
    programs, tiles = triton.cdiv(n, ROWS), triton.cdiv(m, tokens)
    count = max(min(WARPS_WANTED // (programs * tiles * WARPS), words // WORDS), 1)
    parts = parts_for(x, n, count) if count > 1 else None
    with torch.cuda.device_of(x):  # Triton launches on the current device
        join24_kernel[(programs, tiles, count)](
            aligned(x),
            pairs,
            places,
            y if bias is None else bias,
            y if parts is None else parts,
            m,
            n,
            k,
            words,
            count,
            ROWS=ROWS,
            TOKENS=tokens,
            WORDS=WORDS,
            FINISHED=parts is None,
            BIAS=bias is not None and parts is None,
            INTERPRETED=INTERPRETED,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        if parts is not None:
            add_parts(parts, bias, y)
    return y


@join24.register_fake
def _(x: Tensor, pairs: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], places.shape[0])


@triton.jit
def join24_kernel(
    x,
    pairs,
    places,
    bias,
    y,
    M,
    N,
    K,
    words,
    parts,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    FINISHED: tl.constexpr,
    BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row, part = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row64 = row.to(tl.int64)
    eight = tl.arange(0, 8)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(part * WORDS, words, parts * WORDS):
        word = start + tl.arange(0, WORDS)
        live = (row < N)[:, None] & (word < words)[None, :]  # (ROWS, WORDS)
        nibbles = tl.load(places + row64[:, None] * words + word[None, :], mask=live, other=0)
        group = word[:, None] * 8 + eight[None, :]  # (WORDS, 8)
        at = row64[:, None, None] * (words * 8) + group[None, :, :]
        pair = tl.load(pairs + at, mask=live[:, :, None], other=0)
        dense = _dense(pair, nibbles[:, :, None] >> (4 * eight)[None, None, :])  # (ROWS, WORDS, 8, 2, 2)
        tile = tl.reshape(dense, [ROWS, WORDS * 32]).to(x.dtype.element_ty, bitcast=True)
        column = start * 32 + tl.arange(0, WORDS * 32)
        some = tl.load(
            x + token.to(tl.int64)[None, :] * K + column[:, None],
            mask=(token < M)[None, :] & (column < K)[:, None],
            other=0.0,
        )  # (WORDS·32, TOKENS)
        if INTERPRETED:
            tile, some = tile.to(tl.float32), some.to(tl.float32)
        total = tl.dot(tile, some, total)
    if BIAS:
        total += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    out = y + token.to(tl.int64)[None, :] * N + row64[:, None]
    if not FINISHED:
        out += part.to(tl.int64) * M * N
    tl.store(out, total.to(y.dtype.element_ty), mask=(token < M)[None, :] & (row < N)[:, None])


@triton.jit
def _dense(pair, nibble):
    """int32 (…) of pairs, and of nibbles in the lowest bits, → uint16 (…, 2, 2): the group's four inputs in order."""
    first, second = nibble & 3, (nibble >> 2) & 3
    a = (pair & 0xFFFF) << (16 * (first & 1))  # at the odd or the even place of two
    b = ((pair >> 16) & 0xFFFF) << (16 * (second & 1))
    left = tl.where(first < 2, a, 0) | tl.where(second < 2, b, 0)
    right = tl.where(first < 2, 0, a) | tl.where(second < 2, 0, b)
    even = tl.join(left.to(tl.uint16), right.to(tl.uint16))
    odd = tl.join((left >> 16).to(tl.uint16), (right >> 16).to(tl.uint16))
    return tl.join(even, odd)  # (…, left or right, even or odd)
