"""2:4 on the sparse tensor core, for decoding: x (M, K) with M = 1…32 times a weight in fragment order.

A warp owns some tiles of 16 rows and, in turns with others, blocks of 256 inputs. It loads a few fragments, 16 bytes a
lane, ahead of the product that it computes; nothing goes through shared memory and nothing is unpacked. The warps of a
program add their sums at the end; programs that share rows leave theirs to a second pass (splitk.py). The instruction
does the work of 8 tokens or of one in the same time, and is far from the limit at either: what is saved is the bytes,
9 bits a weight against 16.

x is read as it stands up to 8 tokens; beyond, a small kernel first puts it in the order of the registers.

On hardware: never run. The compiled code, the packing and, in Triton's interpreter with the instruction emulated, the
results have been checked; eval/kernels.py and tests/triton_ops/test_gpu.py are for the first GPU at hand. PLANS comes
from arithmetic (warps enough to cover the memory's latency), not from timing.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.mma_sp import LEGAL, mma_sp
from triton_ops.pack24 import BITS_PER_WEIGHT, Fragments24, pack24, unpack24
from triton_ops.requirements import INTERPRETED, aligned, check, unmet
from triton_ops.splitk import add_parts, parts_for

NAME = "mma24"
MOST_TOKENS = 32
CAPABILITY = (8, 0)
bits_per_weight = BITS_PER_WEIGHT


class Plan(NamedTuple):
    """How a product is cut."""

    tiles: int  # of 16 rows, that a warp owns: they share what it loads of x
    warps: int  # of a program; they share the inputs of its rows
    ahead: int  # fragments that a warp loads before it needs them: 1, 2, 4 or 8
    direct: bool  # x is read as it stands, instead of put in the order of the registers first; up to 8 tokens
    parts: int  # programs that share the inputs of the same rows


PLANS = {  # most tokens → plan, for rows enough
    8: Plan(1, 8, 4, True, 1),
    16: Plan(2, 4, 4, False, 1),
    32: Plan(4, 4, 2, False, 1),
}
WARPS_WANTED = 2048  # about 16 for each multiprocessor of an H100 or H200, with 2 to 4 KB of the weight under way each


def plan(n: int, k: int, m: int) -> Plan:
    """The plan for a weight (N, K) and M tokens; a function of the shape alone, so that results do not depend on the
    device. Where rows are few, more programs share their inputs, as long as each warp is left a block of 256."""
    chosen = next(plan for most, plan in PLANS.items() if m <= most)
    programs, blocks = triton.cdiv(triton.cdiv(n, 16), chosen.tiles), triton.cdiv(k, 256)
    parts = min(WARPS_WANTED // (programs * chosen.warps), blocks // chosen.warps)
    return chosen._replace(parts=max(parts, 1))


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, m: int) -> str | None:
    """Why a weight of this shape (N, K) cannot be multiplied here for M tokens, or None."""
    return unmet(NAME, shape, dtype, device, m, most=MOST_TOKENS, capability=CAPABILITY)


def prepare(weight: Tensor, keep: Tensor | None = None) -> Fragments24:
    """(N, K) fp16 or bf16 with zeros → fragments, on the weight's device. Errors as for `pack24`."""
    return pack24(weight, keep)


def restore(packed: Fragments24) -> Tensor:
    """The weight that `prepare` was given, (N, K), to the bit."""
    return unpack24(packed)


def linear(x: Tensor, packed: Fragments24, bias: Tensor | None = None) -> Tensor:
    """x (M, K), bias (N,) → (M, N) in x's dtype, summed in float32. ValueError where dtypes, shapes or device do not
    fit. Safe in a CUDA graph: three launches at most, and memory only from torch's allocator."""
    check(NAME, x, packed.shape, packed.dtype, bias, most=MOST_TOKENS)
    return mma24(x, packed.vals, packed.meta, packed.shape[0], bias)


@torch.library.custom_op("triton_ops::mma24", mutates_args=())
def mma24(x: Tensor, vals: Tensor, meta: Tensor, n: int, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape[0], n)
    if len(y):
        with torch.cuda.device_of(x):  # Triton launches on the current device
            run(aligned(x), vals, meta, bias, y, plan(n, x.shape[1], len(x)))
    return y


@mma24.register_fake
def _(x: Tensor, vals: Tensor, meta: Tensor, n: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], n)


def run(x: Tensor, vals: Tensor, meta: Tensor, bias: Tensor | None, y: Tensor, plan: Plan) -> None:
    """The product into y (M, N), by a given plan."""
    parts = parts_for(x, y.shape[1], plan.parts) if plan.parts > 1 else None
    launch(x, vals, meta, bias, y if parts is None else parts, plan)
    if parts is not None:
        add_parts(parts, bias, y)


def launch(x: Tensor, vals: Tensor, meta: Tensor, bias: Tensor | None, y: Tensor, plan: Plan) -> None:
    """The first pass: into y (M, N) in x's dtype, finished; or into float32 (parts, M, N), without bias."""
    (m, k), n, blocks = x.shape, y.shape[-1], meta.shape[1]
    tokens = triton.next_power_of_2(triton.cdiv(m, 8))
    assert m <= 8 or not plan.direct
    bf16 = x.dtype == torch.bfloat16
    x = x if plan.direct else pack_x(x, tokens, blocks)
    mma24_kernel[(triton.cdiv(meta.shape[0], plan.tiles), plan.parts)](
        x,
        vals,
        meta,
        y if bias is None else bias,
        y,
        m,
        n,
        k,
        meta.shape[0],
        blocks,
        plan.parts,
        TILES=plan.tiles,
        TOKENS=tokens,
        WARPS=plan.warps,
        AHEAD=plan.ahead,
        DIRECT=plan.direct,
        FINISHED=y.ndim == 2,
        BIAS=bias is not None and y.ndim == 2,
        BF16=bf16,
        EMULATE=INTERPRETED,
        num_warps=plan.warps,
        enable_fp_fusion=True,
    )


@triton.jit
def mma24_kernel(
    x,
    vals,
    meta,
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
    AHEAD: tl.constexpr,
    DIRECT: tl.constexpr,
    FINISHED: tl.constexpr,
    BIAS: tl.constexpr,
    BF16: tl.constexpr,
    EMULATE: tl.constexpr,
):
    part = tl.program_id(1)
    tile = (tl.program_id(0) * TILES + tl.arange(0, TILES))[:, None, None, None].to(tl.int64)
    register = tl.arange(0, 4)[None, None, None, :]
    total = tl.zeros([TILES, TOKENS, 32 * WARPS, 4], tl.float32)
    turn = part * WARPS  # the first of the blocks that these warps read now
    words = _load_meta(meta, tile, turn, tiles, blocks, WARPS)
    held = _load(x, vals, tile, turn, 0, M, K, tiles, blocks, TOKENS, WARPS, AHEAD, DIRECT)
    for _ in range(0, tl.cdiv(blocks, parts * WARPS)):
        # What is loaded here is used a turn later: only so does the compiler let the loads run ahead of the products
        after = turn + parts * WARPS
        words_ahead = _load_meta(meta, tile, after, tiles, blocks, WARPS)
        for first in tl.static_range(0, 8, AHEAD):
            if first + AHEAD < 8:
                ahead = _load(x, vals, tile, turn, first + AHEAD, M, K, tiles, blocks, TOKENS, WARPS, AHEAD, DIRECT)
            else:
                ahead = _load(x, vals, tile, after, 0, M, K, tiles, blocks, TOKENS, WARPS, AHEAD, DIRECT)
            for inner in tl.static_range(AHEAD):
                total = mma_sp(held[2 * inner], held[2 * inner + 1], total, words, first + inner, BF16, EMULATE)
            held = ahead
        words, turn = words_ahead, after

    total = tl.sum(tl.reshape(total, [TILES, TOKENS, WARPS, 32, 4]), 2)
    lane = tl.arange(0, 32)[None, None, :, None]
    row = tile * 16 + lane // 4 + 8 * (register // 2)
    token = tl.arange(0, TOKENS)[None, :, None, None] * 8 + 2 * (lane % 4) + register % 2
    if BIAS:
        total += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    at = y + token.to(tl.int64) * N + row
    if not FINISHED:
        at += part.to(tl.int64) * M * N
    tl.store(at, total.to(y.dtype.element_ty), mask=(token < M) & (row < N))


@triton.jit
def _load_meta(meta, tile, turn, tiles, blocks, WARPS: tl.constexpr):
    """Metadata (TILES, 1, 32·WARPS, 4) of the blocks `turn` … `turn + WARPS - 1`, one for each warp; legal beyond the last."""
    thread = tl.arange(0, 32 * WARPS)[None, None, :, None]
    block = turn + thread // 32
    at = (tile * blocks + block) * 128 + thread % 32 * 4 + tl.arange(0, 4)[None, None, None, :]
    return tl.load(meta + at, mask=(tile < tiles) & (block < blocks), other=LEGAL, eviction_policy="evict_first")


@triton.jit
def _load(
    x,
    vals,
    tile,
    turn,
    first: tl.constexpr,
    M,
    K,
    tiles,
    blocks,
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """Fragments of weight and x in turns, for the tiles `first` … `first + AHEAD - 1` of each warp's block."""
    thread = tl.arange(0, 32 * WARPS)
    block = turn + (thread // 32)[None, None, :, None]
    place = (thread % 32)[None, None, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    token_tile = tl.arange(0, TOKENS)[None, :, None, None]
    fragments = ()
    for inner in tl.static_range(first, first + AHEAD):
        from_vals = ((tile * blocks + block) * 8 + inner) * 128 + place
        live = (tile < tiles) & (block < blocks)
        a = tl.load(vals + from_vals, mask=live, other=0, eviction_policy="evict_first")
        if DIRECT:
            b = _load_x(x, thread, turn, inner, M, K)
        else:
            from_x = ((token_tile * blocks + block) * 8 + inner) * 128 + place
            b = tl.load(x + from_x, mask=block < blocks, other=0)
        fragments = fragments + (a, b)  # noqa: RUF005 (Triton knows no unpacking)
    return fragments


@triton.jit
def _load_x(x, thread, turn, inner: tl.constexpr, M, K):
    """Fragments (1, 1, 32·W, 4) of up to 8 tokens, straight from x (M, K): four loads of a word, since a register's two
    inputs are 16 bytes from the next register's. Each of them has a word a thread, which leaves it where it belongs."""
    token, block = thread % 32 // 4, turn + thread // 32
    word = block * 128 + inner * 16 + thread % 4  # of a row of x, two inputs each
    words = x.to(tl.pointer_type(tl.int32)) + token * (K // 2) + word
    b0 = tl.load(words, mask=(token < M) & (word < K // 2), other=0)
    b1 = tl.load(words + 4, mask=(token < M) & (word + 4 < K // 2), other=0)
    b2 = tl.load(words + 8, mask=(token < M) & (word + 8 < K // 2), other=0)
    b3 = tl.load(words + 12, mask=(token < M) & (word + 12 < K // 2), other=0)
    fragment = tl.join(tl.join(b0, b2), tl.join(b1, b3))
    return tl.reshape(fragment, [1, 1, thread.shape[0], 4])


def pack_x(x: Tensor, tokens: int, blocks: int) -> Tensor:
    """x (M, K) → int32 (tokens, blocks · 8, 32, 4), as `reference.pack_x`; 0 beyond M and K."""
    fragments = x.new_empty(tokens, blocks * 8, 32, 4, dtype=torch.int32)
    pack_x_kernel[(blocks, tokens)](x, fragments, *x.shape, blocks, enable_fp_fusion=True)
    return fragments


@triton.jit
def pack_x_kernel(x, fragments, M, K, blocks):
    block, tile = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, 1024)  # words of eight fragments
    register, lane, inner = at % 4, at // 4 % 32, at // 128
    token = tile * 8 + lane // 4
    word = block * 128 + inner * 16 + register * 4 + lane % 4  # of a row of x
    words = x.to(tl.pointer_type(tl.int32)) + token * (K // 2) + word
    read = tl.load(words, mask=(token < M) & (word < K // 2), other=0)
    tl.store(fragments + (tile * blocks + block) * 1024 + at, read)
