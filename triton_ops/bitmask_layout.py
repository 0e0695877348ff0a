"""Layout "bitmask": unstructured sparsity in the fewest bits, one mask bit a weight and the values that are kept.

    values   dtype (nnz,)          the kept values in row order: the checkpoint's own tensor, not copied
    words    int32 (N, C·8)        bit c % 32 of word c // 32 of a row is column c; C = max(1, ⌈K/256⌉), bits beyond K are 0
    starts   int32 or int64 (N, C) where in `values` each chunk of 256 columns begins; int64 from 2³¹ values on

A kernel's tile may begin at any chunk without reading what is left of it. At sparsity s that is 16·(1 - s) + 1 + 1/8
bits for a 16-bit weight (1/4 with int64 starts). Nothing is rounded or reordered: `restore` gives back every bit of the
weight, -0.0 too, and `keep` the mask.
"""

# pyright: basic
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 256  # columns between two starts: at 64 they would cost half a bit a weight
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes an element → dtype of its bit pattern
BLOCK = 2**27  # elements of the weight that are expanded at a time: bounds memory, and torch's 32-bit indices


class BitmaskWeight(NamedTuple):
    """A weight (N, K) as the bitmask kernels read it."""

    values: Tensor
    words: Tensor
    starts: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.words.nbytes + self.starts.nbytes


def prepare(weight: Tensor, keep: Tensor | None = None) -> BitmaskWeight:
    """Lay out a weight (N, K), on its own device. `keep` (N, K) bool says which places are stored; by default those
    whose bits are not all 0, so that -0.0 survives. ValueError where `keep` leaves out one of them."""
    n, k = weight.shape
    weight = weight.contiguous()
    mask = torch.zeros(n, _chunks(k) * CHUNK // 8, dtype=torch.uint8, device=weight.device)
    values: list[Tensor] = []
    for rows in _row_blocks(n, k):
        stored = weight[rows].view(BITS[weight.element_size()]) != 0
        kept = stored if keep is None else keep[rows]
        if keep is not None and bool((stored & ~kept).any()):
            raise ValueError("keep leaves out a weight that is not zero; pass keep=None to store every such place")
        mask[rows, : -(-k // 8)] = _pack_bits(kept)
        values.append(weight[rows][kept])
    words = mask.view(torch.int32)
    return BitmaskWeight(torch.cat(values) if values else weight.new_empty(0), words, _starts(words), (n, k))


def from_neutral(values: Tensor, mask: Tensor, offsets: Tensor | None, shape: tuple[int, int]) -> BitmaskWeight:
    """Lay out the arch-neutral form: `values` (nnz,) in row order, `mask` uint8 (N, ⌈K/8⌉) with the lowest bit first,
    `offsets` (N + 1,) or None. `values` is shared, not copied. ValueError where counts disagree: the kernels trust them.
    """
    n, k = shape
    if tuple(mask.shape) != (n, -(-k // 8)) or mask.dtype != torch.uint8:
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}, wanted uint8 {[n, -(-k // 8)]}")
    if k % 8 and bool((mask[:, -1] >> (k % 8)).any()):
        raise ValueError(f"mask has bits beyond column {k - 1}")
    padded = torch.zeros(n, _chunks(k) * CHUNK // 8, dtype=torch.uint8, device=mask.device)
    padded[:, : mask.shape[1]] = mask
    words = padded.view(torch.int32)
    counts = popcount(words).sum(1)  # (N,), int64
    if int(counts.sum()) != values.numel():
        raise ValueError(f"mask keeps {int(counts.sum())} weights, values holds {values.numel()}")
    if offsets is not None and not torch.equal(offsets.long(), torch.cat((counts.new_zeros(1), counts.cumsum(0)))):
        raise ValueError("mask and offsets disagree")
    return BitmaskWeight(values.flatten(), words, _starts(words), (n, k))


def keep(prepared: BitmaskWeight) -> Tensor:
    """Which places are stored: (N, K) bool."""
    kept = torch.empty(prepared.shape, dtype=torch.bool, device=prepared.words.device)
    for rows in _row_blocks(*prepared.shape):
        kept[rows] = _unpack_bits(prepared, rows)
    return kept


def restore(prepared: BitmaskWeight) -> Tensor:
    """The weight, (N, K), to the bit."""
    bits = prepared.values.view(BITS[prepared.values.element_size()])
    weight = torch.zeros(prepared.shape, dtype=bits.dtype, device=bits.device)
    begin = 0
    for rows in _row_blocks(*prepared.shape):
        kept = _unpack_bits(prepared, rows)
        end = begin + int(kept.sum())
        weight[rows] = weight[rows].masked_scatter(kept, bits[begin:end])
        begin = end
    return weight.view(prepared.values.dtype)


def popcount(words: Tensor) -> Tensor:
    """Bits set in each int32, as int32. torch has no such function; `>>` is arithmetic, so the mask comes after it."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24) & 0xFF


def _chunks(k: int) -> int:
    return max(1, -(-k // CHUNK))


def _row_blocks(n: int, k: int) -> list[slice]:
    step = max(1, BLOCK // max(k, 1))
    return [slice(begin, min(begin + step, n)) for begin in range(0, n, step)]


def _starts(words: Tensor) -> Tensor:
    """(N, C): the values that lie before each chunk."""
    counts = popcount(words).unflatten(1, (-1, CHUNK // 32)).sum(2)  # (N, C), int64
    total = int(counts.sum())
    starts = counts.flatten().cumsum(0).view(counts.shape) - counts
    return starts.to(torch.int32) if total < 2**31 else starts


def _pack_bits(kept: Tensor) -> Tensor:
    """(rows, K) bool → (rows, ⌈K/8⌉) uint8, lowest bit first."""
    rows, k = kept.shape
    padded = torch.nn.functional.pad(kept, (0, -k % 8)).view(rows, -1, 8)
    places = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=kept.device)
    return (padded * places).sum(2, dtype=torch.uint8)


def _unpack_bits(prepared: BitmaskWeight, rows: slice) -> Tensor:
    mask = prepared.words[rows].view(torch.uint8)  # (rows, C·32)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(2) >> places) & 1  # (rows, C·32, 8)
    return bits.flatten(1)[:, : prepared.shape[1]].bool()
