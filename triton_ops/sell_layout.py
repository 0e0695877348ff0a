"""Layout "sell": unstructured sparsity as sliced ELLPACK, one row a thread, columns as 4-bit gaps.

The columns are cut into segments. Within a segment the rows are sorted by how much they keep (SELL-C-σ, Kreutzer et al.
2014, with σ = N) and cut into slices of 128, so that rows of about equal length run beside each other and little is
padding. A row is a list of entries: a value, and how far its column lies from that of the entry before, 0 to 15.
Wider gaps are bridged by entries of value 0. Slices are stored eight entries of every row at a time, a *step*:

    values  dtype (T, 128, 8)   16 bytes to each thread
    gaps    int32 (T, 128)      entry e in bits 4e … 4e + 3; the first entry of a row counts from the segment's begin
    slices  int32 (P·C + 1,)    first step of every slice, P segments of C = ⌈N/128⌉ slices
    order   int32 (P·C·128,)    the row of each thread; N where there is none

That is 20 bits a kept 16-bit weight, 4 to 6 % for padding and 4 bytes of `order` a row of a segment: 6.5 bits a
weight at 70 % (random 4096×4096, segments of 256) against 5.9 of the bitmask; but columns need no counting of bits,
all loads of the weight are whole 16 bytes, and the threads of a warp, while they keep pace, fetch x from 1.5 cache
lines on average (counted on that weight). Bridges make it a poor layout beyond 80 %. `restore` gives back every bit
of the weight; a kept place whose bits are all 0 is not told from a pruned one.
"""

# pyright: basic
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 128  # a slice's, one a thread: four warps
STEP = 8  # entries of a row that lie together
WIDEST = 15  # gap in four bits
SEGMENTS = (4096, 2048, 1024, 512, 256)
WARPS = 2048  # wanted at least: 12 to a multiprocessor on the largest GPU


class SellWeight(NamedTuple):
    """A weight (N, K) as `sell_gemv` reads it."""

    values: Tensor
    gaps: Tensor
    slices: Tensor
    order: Tensor
    shape: tuple[int, int]
    segment: int  # columns

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.gaps.nbytes + self.slices.nbytes + self.order.nbytes


def prepare(weight: Tensor) -> SellWeight:
    """Lay out a weight (N, K) of 16-bit floats, on its own device, a segment at a time."""
    n, k = weight.shape
    segment, bits = segment_for(n, k), weight.view(torch.int16)
    parts = [_segment(bits[:, begin : begin + segment]) for begin in range(0, max(k, 1), segment)]
    values, gaps, steps, order = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    slices = torch.cat((steps.new_zeros(1), steps.cumsum(0))).to(torch.int32)
    return SellWeight(values.view(weight.dtype), gaps, slices, order.to(torch.int32), (n, k), segment)


def segment_for(n: int, k: int) -> int:
    """Columns of a segment: the longest that leaves enough warps to fill a GPU, for long ones need the least padding."""
    warps = -(-n // ROWS) * ROWS // 32
    return next((segment for segment in SEGMENTS if warps * -(-k // segment) >= WARPS), SEGMENTS[-1])


def restore(prepared: SellWeight) -> Tensor:
    """The weight, (N, K), to the bit."""
    n, k = prepared.shape
    slices = prepared.slices.long()
    of_slice = len(prepared.order) // ROWS  # P·C of them
    per_segment = max(1, -(-n // ROWS))
    weight = torch.zeros(n, k, dtype=torch.int16, device=prepared.values.device)
    for first in range(0, of_slice, per_segment):
        begin, end = slices[first], slices[first + per_segment]
        bits = prepared.values[begin:end].view(torch.int16)  # (steps, 128, 8)
        gaps = (prepared.gaps[begin:end, :, None] >> 4 * torch.arange(STEP, device=weight.device)) & WIDEST
        lengths = slices[first : first + per_segment + 1].diff()
        of_step = torch.arange(per_segment, device=weight.device).repeat_interleave(lengths)  # (steps,)
        ends = gaps.sum(2).cumsum(0)  # (steps, 128), over all slices of the segment …
        ends = torch.cat((ends.new_zeros(1, ROWS), ends))
        starts = ends[:-1] - ends[slices[first : first + per_segment] - begin][of_step]  # … from where its own begins
        columns = starts[:, :, None] + gaps.cumsum(2) + first // per_segment * prepared.segment
        rows = prepared.order.view(-1, ROWS)[first + of_step].long()[:, :, None].expand_as(columns)
        stored = bits != 0
        weight[rows[stored], columns[stored]] = bits[stored]
    return weight.view(prepared.values.dtype)


def _segment(bits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bits int16 (N, ≤ segment) → values (T, 128, 8), gaps (T, 128), steps of each slice (C,), order (C·128,)."""
    n, device = bits.shape[0], bits.device
    kept = bits != 0
    row, column = kept.nonzero(as_tuple=True)  # in row order
    first = row.diff(prepend=row.new_full((1,), -1)) != 0
    gap = torch.where(first, column, column.diff(prepend=column.new_zeros(1)))
    bridges = (gap - 1).clamp_min(0) // WIDEST  # entries of value 0 that come before
    ends = (bridges + 1).cumsum(0)  # over all rows

    length = torch.zeros(n, dtype=torch.int64, device=device).index_add_(0, row, bridges + 1)
    place = ends - 1 - (length.cumsum(0) - length)[row]  # of the entry in its row
    sorted_length, order = length.sort(descending=True, stable=True)
    count = max(1, -(-n // ROWS))
    threads = torch.full((count * ROWS,), n, device=device)
    threads[:n] = order
    steps = torch.zeros(count, dtype=torch.int64, device=device)
    steps[: -(-n // ROWS)] = -(-sorted_length[::ROWS] // STEP)  # a slice's longest row is its first
    begins = steps.cumsum(0) - steps
    thread_of = torch.empty_like(order)
    thread_of[order] = torch.arange(n, device=device)

    def position(row: Tensor, place: Tensor) -> Tensor:
        thread = thread_of[row]
        return ((begins[thread // ROWS] + place // STEP) * ROWS + thread % ROWS) * STEP + place % STEP

    total = int(steps.sum())
    values = torch.zeros(total * ROWS * STEP, dtype=torch.int16, device=device)
    codes = torch.zeros(total * ROWS * STEP, dtype=torch.uint8, device=device)
    at = position(row, place)
    values[at] = bits[row, column]
    codes[at] = (gap - WIDEST * bridges).to(torch.uint8)
    which = torch.arange(len(row), device=device).repeat_interleave(bridges)  # the entry that each bridge leads to
    before = torch.arange(len(which), device=device) - (bridges.cumsum(0) - bridges)[which] + 1
    codes[position(row[which], place[which] - before)] = WIDEST
    pairs = codes.view(total, ROWS, STEP // 2, 2)
    gaps = (pairs[..., 0] | pairs[..., 1] << 4).view(torch.int32)  # (T, 128, 1)
    return values.view(total, ROWS, STEP), gaps.squeeze(2), steps, threads
