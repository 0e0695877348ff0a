"""Backend "nested": a weight of small integers and steps, W = step · q, multiplied by at most 8 tokens.

    words     int32 (N, C, 16)       bits 2c, 2c + 1 of word w are column 16·w + c of a chunk of 256: 0, +1, -1, or "more"
    escapes   int8 (E,)              the number of each "more", in row order
    starts    int32 or int64 (N, C)  where in `escapes` each chunk begins
    steps     bfloat16 (N, ⌈K/group⌉)

That is 2 bits a column, 8 for each "more", and 1/8. A product step · q is rounded to the dtype that the weight is stored in, as
the dense weight is; sums are in fp32. A warp takes a few rows and a run of chunks; a column finds its escape by counting
those before it, by shuffles, and where there are few rows, K is split over programs and the parts are added in order (`splitk`).

Decoding costs about 49 instructions a weight (SASS of the loop, sm_90, one token), three times those of "bitmask": this saves
memory, and is a speed-up only where a benchmark on the device says so. Compiled for sm_80, sm_90 and sm_100 without spills and
run in the interpreter; it has not run on hardware.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.bitmask_gemv import chunks_each
from triton_ops.requirements import check, unmet
from triton_ops.splitk import add_parts, parts_for

NAME = "nested"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROUND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # what step · q becomes
MAX_TOKENS = 8
CHUNK = 256
MORE = 3
BLOCK = 2**24  # places that are laid out at a time


class NestedWeight(NamedTuple):
    """A weight (N, K) as the kernel reads it."""

    words: Tensor
    escapes: Tensor
    starts: Tensor
    steps: Tensor
    group: int  # columns that share a step
    shape: tuple[int, int]
    stored: torch.dtype  # that step · q is rounded to

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.words, self.escapes, self.starts, self.steps))


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, m: int) -> str | None:
    """Why a weight of this shape (N, K) cannot be multiplied here for M tokens, or None."""
    return unmet(NAME, shape, dtype, device, m, most=MAX_TOKENS, dtypes=DTYPES, multiple=1)


def prepare(q: Tensor, steps: Tensor, group: int, stored: torch.dtype) -> NestedWeight:
    """Lay out q int8 (N, K) with steps bfloat16 (N, ⌈K/group⌉), on its own device."""
    n, k = q.shape
    chunks = max(1, -(-k // CHUNK))
    shifts = 2 * torch.arange(16, device=q.device)
    words = torch.zeros(n, chunks, 16, dtype=torch.int32, device=q.device)
    counts = torch.zeros(n, chunks, dtype=torch.int64, device=q.device)
    escapes: list[Tensor] = []
    for begin in range(0, n, step := max(1, BLOCK // max(k, 1))):
        rows = slice(begin, begin + step)
        pairs = torch.nn.functional.pad(_pairs(q[rows]), (0, chunks * CHUNK - k)).view(-1, chunks, 16, 16)
        words[rows] = (pairs.long() << shifts).sum(3).to(torch.int32)  # bit 31 wraps to negative
        counts[rows] = (pairs == MORE).sum((2, 3))
        escapes.append(q[rows][_pairs(q[rows]) == MORE])
    starts = counts.flatten().cumsum(0).view(counts.shape) - counts
    found = torch.cat([*escapes, q.new_zeros(1)])  # an address, also where there is none
    starts = starts.to(torch.int32) if found.numel() < 2**31 else starts
    return NestedWeight(words, found, starts, steps.contiguous(), group, (n, k), stored)


def numbers(prepared: NestedWeight) -> Tensor:
    """q, int8 (N, K)."""
    n, k = prepared.shape
    shifts = 2 * torch.arange(16, device=prepared.words.device)
    pairs = ((prepared.words[..., None] >> shifts) & 3).view(n, -1)[:, :k]
    q = torch.tensor([0, 1, -1, 0], dtype=torch.int8, device=pairs.device)[pairs.long()]
    return q.masked_scatter(pairs == MORE, prepared.escapes)


def dense(prepared: NestedWeight) -> Tensor:
    """The weight (N, K), in the dtype that it is stored in."""
    steps = prepared.steps.float().repeat_interleave(prepared.group, dim=1)[:, : prepared.shape[1]]
    return (numbers(prepared) * steps).to(prepared.stored)


def linear(x: Tensor, prepared: NestedWeight, bias: Tensor | None = None) -> Tensor:
    """x (M, K) with M ≤ 8, in the dtype that the weight is stored in or float32; bias (N,) or None → (M, N) in that dtype, the
    same every run. ValueError where dtypes, shapes or device do not fit. Safe in a CUDA graph."""
    dtype = x.dtype if x.dtype == torch.float32 else prepared.stored
    check(NAME, x, prepared.shape, dtype, bias, most=MAX_TOKENS)
    layout = (prepared.words, prepared.escapes, prepared.starts, prepared.steps)
    return nested_product(x, *layout, prepared.group, ROUND[prepared.stored], bias)


@torch.library.custom_op("triton_ops::nested_product", mutates_args=())
def nested_product(
    x: Tensor,
    words: Tensor,
    escapes: Tensor,
    starts: Tensor,
    steps: Tensor,
    group: int,
    rounding: int,
    bias: Tensor | None,
) -> Tensor:
    """x (M, K), a weight (N, K) as `NestedWeight` holds it, `rounding` as of ROUND, bias (N,) → (M, N) in x's dtype."""
    (m, k), (n, chunks) = x.shape, starts.shape
    rows = rows_for(m)
    each = chunks_each(triton.cdiv(n, rows), chunks)
    split = max(1, triton.cdiv(chunks, each))
    y = x.new_empty(m, n)
    sums = parts_for(x, n, split) if split > 1 else y
    if y.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            nested_kernel[(triton.cdiv(n, rows), split)](
                words, escapes, starts, steps, x.contiguous(), bias, sums, n, k, m, chunks, each, group, steps.shape[1],
                ROWS=rows, TOKENS=triton.next_power_of_2(m), ROUND=rounding, SPLIT=split > 1,
                ALIKE=group % CHUNK == 0 or group >= k, num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
            if split > 1:
                add_parts(sums, bias, y)
    return y


@nested_product.register_fake
def _(
    x: Tensor,
    words: Tensor,
    escapes: Tensor,
    starts: Tensor,
    steps: Tensor,
    group: int,
    rounding: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[0])


def rows_for(m: int) -> int:
    """A program's, which is one warp: its sums of so many rows, tokens and 256 columns take 64 registers at most."""
    return 2 if m <= 4 else 1


@triton.jit
def nested_kernel(words, escapes, starts, steps, x, bias, out, n, k, m, chunks, chunks_each, group, groups,
                  ROWS: tl.constexpr, TOKENS: tl.constexpr, ROUND: tl.constexpr, SPLIT: tl.constexpr,
                  ALIKE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    inside = row < n
    of_row = row.to(tl.int64)
    column, token = tl.arange(0, 256), tl.arange(0, TOKENS)
    total = tl.zeros([ROWS, TOKENS, 256], tl.float32)
    for chunk in range(part * chunks_each, tl.minimum((part + 1) * chunks_each, chunks)):
        at = chunk * 256 + column
        here = of_row * chunks + chunk
        word = tl.load(words + here[:, None] * 16 + (column // 16)[None, :], mask=inside[:, None], other=0)
        pair = (word >> (2 * (column % 16))[None, :]) & 3
        more = (pair == 3).to(tl.int32)
        first = tl.load(starts + here, mask=inside, other=0)
        far = tl.load(escapes + first[:, None] + (tl.cumsum(more, 1) - more), mask=pair == 3, other=0).to(tl.int32)
        q = tl.where(pair == 3, far, (pair & 1) - (pair >> 1))
        valid = inside[:, None] & (at < k)[None, :]
        if ALIKE:  # columns of a chunk have one step
            step = tl.load(steps + of_row * groups + chunk * 256 // group, mask=inside, other=0.0)[:, None]
        else:
            step = tl.load(steps + of_row[:, None] * groups + (at // group)[None, :], mask=valid, other=0.0)
        weight = q.to(tl.float32) * step.to(tl.float32)
        if ROUND == 1:  # to nearest, ties to even, by hand: the interpreter would cut off
            bits = weight.to(tl.int32, bitcast=True)
            weight = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        elif ROUND == 2:
            weight = weight.to(tl.float16).to(tl.float32)
        known = (token < m)[:, None] & (at < k)[None, :]
        inputs = tl.load(x + token.to(tl.int64)[:, None] * k + at[None, :], mask=known, other=0.0).to(tl.float32)
        total += weight[:, None, :] * inputs[None, :, :]
    y = tl.sum(total, 2)
    valid = inside[:, None] & (token < m)[None, :]
    if not SPLIT and bias is not None:
        y += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = (part * m + token).to(tl.int64)[None, :] * n + row[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=valid)


def _pairs(q: Tensor) -> Tensor:
    """What a column's two bits say, uint8."""
    small = torch.where(q == 0, 0, torch.where(q == 1, 1, torch.where(q == -1, 2, MORE)))
    return small.to(torch.uint8)
