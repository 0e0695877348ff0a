"""What a warp of `mma24` loads: fragments of the weight, their metadata and fragments of x.

Each function gives a tuple of tensors (32·W, 4) int32, a row to each lane: a tensor with an axis for tiles or tokens would
leave it to the compiler along which of them lanes are dealt (mma_sp.py). Warp w reads block `turn + w` of 256 inputs.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from triton_ops.mma_sp import LEGAL


@triton.jit
def load_meta(meta, tile, turn, tiles, blocks, TILES: tl.constexpr, WARPS: tl.constexpr):
    """Metadata of a block for each of the tiles `tile` … `tile + TILES - 1`; legal beyond the last."""
    thread = tl.arange(0, 32 * WARPS)[:, None]
    block = turn + thread // 32
    words = ()
    for r in tl.static_range(TILES):
        at = ((tile + r).to(tl.int64) * blocks + block) * 128 + thread % 32 * 4 + tl.arange(0, 4)[None, :]
        live = block < tl.where(tile + r < tiles, blocks, 0)
        read = tl.load(meta + at, mask=live, other=LEGAL, eviction_policy="evict_first")
        words = words + (read,)  # noqa: RUF005 (Triton knows no unpacking)
    return words


@triton.jit
def load_vals(
    vals, tile, turn, first: tl.constexpr, tiles, blocks, TILES: tl.constexpr, WARPS: tl.constexpr, GROUP: tl.constexpr
):
    """GROUP · TILES fragments of the weight, the tiles of rows innermost: `first` … `first + GROUP - 1` of the eight in a
    block; 0 beyond the last."""
    thread = tl.arange(0, 32 * WARPS)[:, None]
    block = turn + thread // 32
    fragments = ()
    for inner in tl.static_range(first, first + GROUP):
        for r in tl.static_range(TILES):
            fragment = ((tile + r).to(tl.int64) * blocks + block) * 8 + inner
            live = block < tl.where(tile + r < tiles, blocks, 0)
            at = vals + fragment * 128 + thread % 32 * 4 + tl.arange(0, 4)[None, :]
            read = tl.load(at, mask=live, other=0, eviction_policy="evict_first")
            fragments = fragments + (read,)  # noqa: RUF005
    return fragments


@triton.jit
def load_tokens(
    x, turn, first: tl.constexpr, M, K, blocks,
    TOKENS: tl.constexpr, WARPS: tl.constexpr, GROUP: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """GROUP · TOKENS fragments of x, the tiles of 8 tokens innermost, for the same of the eight; 0 beyond M and K.
    `DIRECT`: of up to 8 tokens, from x (M, K) itself; otherwise from what `pack_x` made of it."""
    thread = tl.arange(0, 32 * WARPS)
    fragments = ()
    for inner in tl.static_range(first, first + GROUP):
        if DIRECT:
            fragments = fragments + (_from_rows(x, thread, turn, inner, M, K),)  # noqa: RUF005
        else:
            block = (turn + thread // 32)[:, None]
            place = (thread % 32)[:, None] * 4 + tl.arange(0, 4)[None, :]
            for t in tl.static_range(TOKENS):
                read = tl.load(x + ((t * blocks + block) * 8 + inner) * 128 + place, mask=block < blocks, other=0)
                fragments = fragments + (read,)  # noqa: RUF005
    return fragments


@triton.jit
def _from_rows(x, thread, turn, inner: tl.constexpr, M, K):
    """A fragment straight from x (M, K): four loads of a word, since a register's two inputs are 16 bytes from the next
    register's. Each of them has a word a thread, which leaves it where it belongs."""
    token, block = thread % 32 // 4, turn + thread // 32
    word = block * 128 + inner * 16 + thread % 4  # of a row of x, two inputs each
    words = x.to(tl.pointer_type(tl.int32)) + token * (K // 2) + word
    b0 = tl.load(words, mask=(token < M) & (word < K // 2), other=0)
    b1 = tl.load(words + 4, mask=(token < M) & (word + 4 < K // 2), other=0)
    b2 = tl.load(words + 8, mask=(token < M) & (word + 8 < K // 2), other=0)
    b3 = tl.load(words + 12, mask=(token < M) & (word + 12 < K // 2), other=0)
    return tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), [thread.shape[0], 4])
