"""The kernel of `mma24` and, for one token, of `split24`.

A warp owns some tiles of 16 rows and, in turns with the program's others, blocks of 256 inputs: eight fragments of each
tile, 16 bytes a lane. It holds them in a ring: what a product has used is loaded anew from the next turn's block at once,
so that all eight are under way, most of the time, in no more registers than they fill. Nothing goes through shared memory
and nothing is unpacked. The warps of a program add their sums at the end; programs that share rows leave theirs to a
second pass (splitk.py).

With `ENTRIES`, the rest of a split weight (split24.py) is added in the same loop: as many entries of each row a turn as
rows have on average, read beside the fragments, and after the last turn what longer rows have left. The rows of a program
stand one behind the other in one axis, so that lanes run along a row's entries, which lie together.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.halves import high
from triton_ops.mma24_load import load_meta, load_tokens, load_vals
from triton_ops.mma24_plan import Plan
from triton_ops.mma_sp import mma_sp
from triton_ops.pack_x import pack_x
from triton_ops.requirements import INTERPRETED
from triton_ops.splitk import add_parts, parts_for

Residual = tuple[Tensor, Tensor]  # entries and offsets of a `Split24`


def run(
    x: Tensor, vals: Tensor, meta: Tensor, bias: Tensor | None, y: Tensor, plan: Plan, rest: Residual | None = None
) -> None:
    """The product into y (M, N), by a given plan; with the entries of `rest`, for one token."""
    parts = parts_for(x, y.shape[1], plan.parts) if plan.parts > 1 else None
    launch(x, vals, meta, bias, y if parts is None else parts, plan, rest)
    if parts is not None:
        add_parts(parts, bias, y)


def launch(
    x: Tensor, vals: Tensor, meta: Tensor, bias: Tensor | None, y: Tensor, plan: Plan, rest: Residual | None = None
) -> None:
    """The first pass: into y (M, N) in x's dtype, finished; or into float32 (parts, M, N), without bias."""
    (m, k), n, (tiles, blocks) = x.shape, y.shape[-1], meta.shape[:2]
    tokens = triton.next_power_of_2(triton.cdiv(m, 8))
    assert m <= 8 or not plan.direct
    assert rest is None or (m == 1 and plan.tiles == 1)
    entries, offsets = rest or (None, None)
    mma24_kernel[(triton.cdiv(tiles, plan.tiles), plan.parts)](
        x if plan.direct else pack_x(x, tokens, blocks),
        vals,
        meta,
        entries,
        offsets,
        y if bias is None else bias,
        y,
        m,
        n,
        k,
        tiles,
        blocks,
        plan.parts,
        TILES=plan.tiles,
        TOKENS=tokens,
        WARPS=plan.warps,
        GROUP=plan.group,
        DIRECT=plan.direct,
        ENTRIES=0 if entries is None else entries_of_a_turn(len(entries) / n, blocks, plan),
        FINISHED=y.ndim == 2,
        BIAS=bias is not None and y.ndim == 2,
        BF16=x.dtype == torch.bfloat16,
        EMULATE=INTERPRETED,
        num_warps=plan.warps,
        enable_fp_fusion=True,
    )


def entries_of_a_turn(average: float, blocks: int, plan: Plan) -> int:
    """Of each row, that a program adds beside its turn's fragments: what the average row has there and a quarter more, so
    that few rows have any left after the last turn."""
    turns = triton.cdiv(blocks, plan.warps * plan.parts)
    return max(16, min(256, triton.next_power_of_2(int(1.25 * average / (turns * plan.parts)) + 1)))


@triton.jit
def mma24_kernel(
    x,
    vals,
    meta,
    entries,
    offsets,
    bias,
    y,
    M,
    N,
    K,
    tiles,
    blocks,
    parts,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    GROUP: tl.constexpr,
    DIRECT: tl.constexpr,
    ENTRIES: tl.constexpr,
    FINISHED: tl.constexpr,
    BIAS: tl.constexpr,
    BF16: tl.constexpr,
    EMULATE: tl.constexpr,
):
    part, tile = tl.program_id(1), tl.program_id(0) * TILES
    totals = ()  # (32·W, 4) for each tile of rows and, innermost, of tokens
    for _ in tl.static_range(TILES * TOKENS):
        totals = totals + (tl.zeros([32 * WARPS, 4], tl.float32),)  # noqa: RUF005
    if ENTRIES:
        at = tl.arange(0, 16 * ENTRIES)
        own = tile * 16 + at // ENTRIES  # row
        place = tl.load(offsets + own, mask=own < N, other=0) + part * ENTRIES + at % ENTRIES
        end = tl.load(offsets + own + 1, mask=own < N, other=0)
        rest = tl.zeros([16 * ENTRIES], tl.float32)
        entry = tl.load(entries + place, mask=place < end, other=0, eviction_policy="evict_first")
    turn = part * WARPS  # the first of the blocks that these warps read now
    words = load_meta(meta, tile, turn, tiles, blocks, TILES, WARPS)
    ring = load_vals(vals, tile, turn, 0, tiles, blocks, TILES, WARPS, 8)
    ahead = load_tokens(x, turn, 0, M, K, blocks, TOKENS, WARPS, GROUP, DIRECT)
    for _ in range(0, tl.cdiv(blocks, parts * WARPS)):
        # What is loaded here is used a turn later: only so does the compiler let the loads run ahead of the products
        after = turn + parts * WARPS
        words_ahead = load_meta(meta, tile, after, tiles, blocks, TILES, WARPS)
        if ENTRIES:
            some = tl.load(x + (entry & 0xFFFF))  # where there is no entry, input 0: not counted
        for first in tl.static_range(0, 8, GROUP):
            tokens = ahead
            if first + GROUP < 8:
                ahead = load_tokens(x, turn, first + GROUP, M, K, blocks, TOKENS, WARPS, GROUP, DIRECT)
            else:
                ahead = load_tokens(x, after, 0, M, K, blocks, TOKENS, WARPS, GROUP, DIRECT)
            for inner in tl.static_range(GROUP):
                added = ()
                for r in tl.static_range(TILES):
                    for t in tl.static_range(TOKENS):
                        a, b, total = ring[inner * TILES + r], tokens[inner * TOKENS + t], totals[r * TOKENS + t]
                        added = added + (mma_sp(a, b, total, words[r], first + inner, BF16, EMULATE),)  # noqa: RUF005
                totals = added
            if ENTRIES and first == 0:
                rest += _product(entry, some, BF16)
                place += parts * ENTRIES
                entry = tl.load(entries + place, mask=place < end, other=0, eviction_policy="evict_first")
            fresh = load_vals(vals, tile, after, first, tiles, blocks, TILES, WARPS, GROUP)
            ring = _turned(ring, fresh, GROUP * TILES, 8 * TILES)
        words, turn = words_ahead, after

    g, h, token0 = tl.arange(0, 32) // 4, tl.arange(0, 4), 2 * (tl.arange(0, 32) % 4)
    of_rows = tl.zeros([32, 4], tl.float32)  # what is added to the rows, in the order of the fragments of the product
    if ENTRIES:
        while tl.max(end - place, 0) > 0:  # rows longer than most: their next entries are loaded already
            rest += _product(entry, tl.load(x + (entry & 0xFFFF)), BF16)
            place += parts * ENTRIES
            entry = tl.load(entries + place, mask=place < end, other=0, eviction_policy="evict_first")
        sums = tl.trans(tl.reshape(tl.sum(tl.reshape(rest, [16, ENTRIES]), 1), [2, 8]))  # g, row g or g + 8
        of_rows = tl.reshape(tl.broadcast_to(sums[:, None, :, None], [8, 4, 2, 2]), [32, 4])
    for r in tl.static_range(TILES):
        row = (tile + r) * 16 + g[:, None] + 8 * (h // 2)[None, :]  # (32, 4)
        shift = of_rows
        if BIAS:
            shift += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
        for t in tl.static_range(TOKENS):
            total = tl.sum(tl.reshape(totals[r * TOKENS + t], [WARPS, 32, 4]), 0) + shift
            token = t * 8 + token0[:, None] + (h % 2)[None, :]
            to = y + token.to(tl.int64) * N + row
            if not FINISHED:
                to += part.to(tl.int64) * M * N
            tl.store(to, total.to(y.dtype.element_ty), mask=(token < M) & (row < N))


@triton.jit
def _product(entry, some, BF16: tl.constexpr):
    """Value of each entry times its input; 0 where there is no entry, whatever the input."""
    return tl.where(entry == 0, 0.0, high(entry, BF16) * some.to(tl.float32))


@triton.jit
def _turned(ring, fresh, COUNT: tl.constexpr, ALL: tl.constexpr):
    """The ring of ALL fragments without its first COUNT, and `fresh` behind."""
    turned = ()
    for i in tl.static_range(COUNT, ALL):
        turned = turned + (ring[i],)  # noqa: RUF005
    for i in tl.static_range(COUNT):
        turned = turned + (fresh[i],)  # noqa: RUF005
    return turned
