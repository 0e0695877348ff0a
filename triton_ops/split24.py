"""Unstructured sparsity as 2:4 and a small residual: nothing is dropped.

Every group of four inputs leaves its two largest to a 2:4 part, which runs through `mma24`; what is left, where three or
four of a group survived, is a list of entries for each row. At 70 % that is 2.3 % of the weights, and 9.7 bits a weight
in all: fewer than dense's 16, in the reading pattern of the sparse tensor core. The lower the sparsity, the longer the
lists: from 60 % up it pays, by the bytes.

For one token the entries are added by the same launch (mma24_kernel.py). For more, they are in a second pass, which also
adds the sums of the first, the bias, and rounds once: an entry needs x at any input, for all tokens, so x is turned
first, that they stand side by side, and the sums of many tokens leave no registers beside the fragments.

On hardware: never run; see mma24.py.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.halves import high
from triton_ops.mask24 import mask24
from triton_ops.mma24_kernel import launch, run
from triton_ops.mma24_plan import plan
from triton_ops.pack24 import BITS_PER_WEIGHT, Fragments24, pack24, unpack24
from triton_ops.requirements import aligned, check, unmet
from triton_ops.splitk import parts_for

NAME = "split24"
MOST_TOKENS = 32
WIDEST = 1 << 16  # an entry has 16 bits for its column
CAPABILITY = (8, 0)
ROWS, WARPS = 4, 4  # a program's rows


class Split24(NamedTuple):
    """A weight (N, K) as the two largest of every group, and the rest."""

    two: Fragments24
    entries: Tensor  # int32 (R,): the column in the low half, the value's bits in the high half; a row's are together
    offsets: Tensor  # int32 (N + 1,): the entries of row n are [offsets[n], offsets[n + 1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.two.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.two.dtype


def bits_per_weight(sparsity: float) -> float:
    """Of a weight whose survivors are anywhere: 9, and 32 for each that is third or fourth in its group.

    >>> round(bits_per_weight(0.7), 2)
    9.73
    """
    kept = 1 - sparsity
    return BITS_PER_WEIGHT + 32 * (kept**3 * sparsity * 4 + kept**4 * 2) / 4


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, m: int) -> str | None:
    """Why a weight of this shape (N, K) cannot be multiplied here for M tokens, or None."""
    return unmet(NAME, shape, dtype, device, m, most=MOST_TOKENS, widest=WIDEST, capability=CAPABILITY)


def prepare(weight: Tensor, keep: Tensor | None = None) -> Split24:
    """(N, K) fp16 or bf16 with zeros, K a multiple of 4 up to 65536 → Split24, on the weight's device. `keep` (N, K) bool
    has no effect but a check: all bits that are not 0 are kept. ValueError where it would lose one."""
    if weight.shape[-1] > WIDEST:
        raise ValueError(f"{NAME} takes K up to {WIDEST}, got {weight.shape[-1]}")
    stored, two = weight.contiguous().view(torch.int16) != 0, mask24(weight)
    if keep is not None and bool((stored & ~keep).any()):
        raise ValueError("the keep-mask leaves out a weight that is not zero")
    rest = stored & ~two
    row, column = rest.nonzero(as_tuple=True)  # in row order
    bits = weight[row, column].view(torch.int16).int()
    counts = rest.sum(1).cumsum(0)
    if len(row) >= 1 << 31:
        raise ValueError(f"{NAME} takes a residual of fewer than 2^31 weights, got {len(row)}")
    offsets = torch.cat((counts.new_zeros(1), counts)).to(torch.int32)
    return Split24(pack24(weight.masked_fill(~two, 0)), bits << 16 | column.int(), offsets)


def restore(packed: Split24) -> Tensor:
    """The weight that `prepare` was given, (N, K), to the bit."""
    weight = unpack24(packed.two)
    counts = packed.offsets.diff()
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    bits = (packed.entries >> 16).to(torch.int16)
    weight.view(torch.int16)[row, packed.entries & 0xFFFF] = bits
    return weight


def linear(x: Tensor, packed: Split24, bias: Tensor | None = None) -> Tensor:
    """x (M, K), bias (N,) → (M, N) in x's dtype, summed in float32. ValueError where dtypes, shapes or device do not
    fit. Safe in a CUDA graph: four launches at most, and memory only from torch's allocator."""
    check(NAME, x, packed.shape, packed.dtype, bias, most=MOST_TOKENS)
    return split24(x, packed.two.vals, packed.two.meta, packed.entries, packed.offsets, bias)


@torch.library.custom_op("triton_ops::split24", mutates_args=())
def split24(x: Tensor, vals: Tensor, meta: Tensor, entries: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    (m, k), n = x.shape, len(offsets) - 1
    y = x.new_empty(m, n)
    if m:
        cut = plan(n, k, m)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            x = aligned(x)
            if m == 1:
                run(x, vals, meta, bias, y, cut, (entries, offsets))
            else:
                parts = parts_for(x, n, cut.parts)
                launch(x, vals, meta, None, parts, cut)
                add_residual(x, parts, entries, offsets, bias, y)
    return y


@split24.register_fake
def _(x: Tensor, vals: Tensor, meta: Tensor, entries: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], offsets.shape[0] - 1)


def add_residual(x: Tensor, parts: Tensor, entries: Tensor, offsets: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """x (M, K), parts float32 (P, M, N) → y (M, N): the parts' sum, the entries' products and the bias, rounded once."""
    (count, m, n), k = parts.shape, x.shape[1]
    tokens = triton.next_power_of_2(m)
    turned = x.new_empty(k, tokens)
    turn_kernel[(triton.cdiv(k, 128),)](x, turned, m, k, TOKENS=tokens, INPUTS=128, enable_fp_fusion=True)
    add_residual_kernel[(triton.cdiv(n, ROWS),)](
        turned,
        parts,
        entries,
        offsets,
        y if bias is None else bias,
        y,
        m,
        n,
        PARTS=count,
        TOKENS=tokens,
        ROWS=ROWS,
        ENTRIES=entries_for(tokens),
        BIAS=bias is not None,
        BF16=x.dtype == torch.bfloat16,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def entries_for(tokens: int) -> int:
    """How many entries of a row are added at a time: as many as leave the sums in registers."""
    return max(min(256 // tokens, 64), 16)


@triton.jit
def turn_kernel(x, turned, M, K, TOKENS: tl.constexpr, INPUTS: tl.constexpr):
    """x (M, K) → turned (K, TOKENS); 0 beyond M."""
    column = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    token = tl.arange(0, TOKENS)
    inside = (column < K)[None, :]
    read = tl.load(x + token[:, None] * K + column[None, :], mask=(token < M)[:, None] & inside, other=0.0)
    tl.store(turned + column[:, None] * TOKENS + token[None, :], tl.trans(read), mask=tl.trans(inside))


@triton.jit
def add_residual_kernel(
    turned,
    parts,
    entries,
    offsets,
    bias,
    y,
    M,
    N,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BIAS: tl.constexpr,
    BF16: tl.constexpr,
):
    row, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    start = tl.load(offsets + row, mask=row < N, other=0)
    length = tl.load(offsets + row + 1, mask=row < N, other=0) - start
    total = tl.zeros([ROWS, ENTRIES, TOKENS], tl.float32)
    for first in range(0, tl.max(length, 0), ENTRIES):
        place = first + tl.arange(0, ENTRIES)[None, :]
        live = place < length[:, None]  # (ROWS, ENTRIES)
        entry = tl.load(entries + start[:, None] + place, mask=live, other=0)
        at = (entry & 0xFFFF)[:, :, None] * TOKENS + token[None, None, :]
        some = tl.load(turned + at, mask=live[:, :, None], other=0.0)
        total += high(entry, BF16)[:, :, None] * some.to(tl.float32)
    result = tl.sum(total, 1)  # (ROWS, TOKENS)
    inside = (row < N)[:, None] & (token < M)[None, :]
    token = token.to(tl.int64)
    for part in tl.static_range(PARTS):
        at = (part * M + token)[None, :] * N + row[:, None]
        result += tl.load(parts + at, mask=inside, other=0.0)
    if BIAS:
        result += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + token[None, :] * N + row[:, None], result.to(y.dtype.element_ty), mask=inside)
