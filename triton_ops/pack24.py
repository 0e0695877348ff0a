"""2:4 weights in the two orders that kernels read, 9 bits a weight each, and back to the bit.

    Rows24       select24, join24      a row's pairs of values, a nibble for the places of each pair
    Fragments24  mma24, split24        what each lane of the sparse tensor core's warp holds, 16 bytes at a time

Both are described, and defined, in reference.py. Plain torch on the weight's device, some rows at a time: packing reads
the weight once, and an int64 for every group is its largest scratch.

The places come from the keep-mask, or from the bits, never from comparing with zero: -0.0 is a value. They are always
two different, ascending ones, also where fewer survived, since `mma.sp` is undefined for others.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from triton_ops.mask24 import need_groups

BITS_PER_WEIGHT = 9.0  # two values of 16 bits and two places of 2 bits for four weights
CHUNK = 1 << 24  # groups packed at a time: scratch of a few hundred MB
DTYPES = (torch.float16, torch.bfloat16)


class Rows24(NamedTuple):
    """A weight of `shape` (N, K) in row order; Kp is K rounded up to 32."""

    pairs: Tensor  # int32 (N, Kp/4): a group's first value in the low half, its second in the high half
    places: Tensor  # int32 (N, Kp/32): eight nibbles i0 | i1 << 2, the first group lowest
    shape: tuple[int, int]
    dtype: torch.dtype


class Fragments24(NamedTuple):
    """A weight of `shape` (N, K) in fragment order; Np is N rounded up to 16, Kp is K rounded up to 256."""

    vals: Tensor  # int32 (Np/16, Kp/32, 32 lanes, 4 registers)
    meta: Tensor  # int32 (Np/16, Kp/256, 32 lanes, 4 words): word j serves the tiles 2j and 2j + 1 of eight
    shape: tuple[int, int]
    dtype: torch.dtype


def pack_rows(weight: Tensor, keep: Tensor | None = None) -> Rows24:
    """(N, K) fp16 or bf16 with zeros, K a multiple of 4 → Rows24. `keep` (N, K) bool; without it, every place whose bits
    are not all 0. ValueError where a group keeps more than two, or `keep` would lose a value."""
    n, k = weight.shape
    pairs = weight.new_empty(n, _up(k, 32) // 4, dtype=torch.int32)
    places = weight.new_empty(n, _up(k, 32) // 32, dtype=torch.int32)
    for rows, words, nibbles in _groups(weight, keep, 1, 32):
        pairs[rows] = words
        places[rows] = _joined(nibbles.unflatten(1, (-1, 8)))
    return Rows24(pairs, places, (n, k), weight.dtype)


def unpack_rows(packed: Rows24) -> Tensor:
    """The weight that `pack_rows` was given, (N, K), to the bit."""
    nibbles = _split(packed.places, 8).flatten(1)  # (N, Kp/4)
    return _dense(packed.pairs, nibbles, packed.shape, packed.dtype)


def pack24(weight: Tensor, keep: Tensor | None = None) -> Fragments24:
    """(N, K) fp16 or bf16 with zeros, K a multiple of 4 → Fragments24. `keep` and errors as for `pack_rows`."""
    n, k = weight.shape
    tiles, groups = _up(n, 16) // 16, _up(k, 256) // 256
    vals = weight.new_empty(tiles, groups * 8, 32, 4, dtype=torch.int32)
    meta = weight.new_empty(tiles, groups, 32, 4, dtype=torch.int32)
    for rows, words, nibbles in _groups(weight, keep, 16, 256):
        some = slice(rows.start // 16, -(-rows.stop // 16))
        # words (16·T, Kp/4): row = 16·tile + 8·r8 + g, group = 8·col + 4·half + t; register = 2·half + r8, lane = 4·g + t
        words = words.view(-1, 2, 8, groups * 8, 2, 4)  # tile, r8, g, col, half, t
        vals[some] = words.permute(0, 3, 2, 5, 4, 1).reshape(-1, groups * 8, 32, 4)
        # group = 64·block + 16·j + 8·s + 4·half + nibble; lane = 4·g + 2·s + half
        quads = _joined(nibbles.view(-1, 2, 8, groups, 4, 2, 2, 4))  # tile, r8, g, block, j, s, half
        words = quads[:, 0] | quads[:, 1] << 16
        meta[some] = words.permute(0, 2, 1, 4, 5, 3).reshape(-1, groups, 32, 4)
    return Fragments24(vals, meta, (n, k), weight.dtype)


def unpack24(packed: Fragments24) -> Tensor:
    """The weight that `pack24` was given, (N, K), to the bit."""
    tiles, groups = packed.meta.shape[:2]
    words = packed.vals.view(tiles, groups * 8, 8, 4, 2, 2).permute(0, 5, 2, 1, 4, 3)  # the permutation of pack24, back
    meta = packed.meta.view(tiles, groups, 8, 2, 2, 4).permute(0, 2, 1, 5, 3, 4)  # tile, g, block, j, s, half
    halves = torch.stack((meta & 0xFFFF, meta >> 16 & 0xFFFF), dim=1)  # tile, r8, g, block, j, s, half
    nibbles = _split(halves, 4).reshape(tiles * 16, -1)
    return _dense(words.reshape(tiles * 16, -1), nibbles, packed.shape, packed.dtype)


def _groups(weight: Tensor, keep: Tensor | None, tall: int, wide: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows at a time: which, their pairs int32 (R, Kp/4) and nibbles int32 (R, Kp/4), padded to `tall` × `wide`."""
    need_groups(weight)
    if weight.dtype not in DTYPES:
        raise ValueError(f"2:4 kernels take float16 or bfloat16 weights, got {weight.dtype}")
    n, k = weight.shape
    step = max(CHUNK * 4 // _up(k, wide) // tall, 1) * tall
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        some = _padded(weight[rows], tall, wide)
        stored = some.view(torch.int16) != 0
        kept = stored if keep is None else _padded(keep[rows], tall, wide)
        number = kept.view(torch.int32)  # four bytes of 0 or 1: a group
        number = (number | number >> 7 | number >> 14 | number >> 21) & 15  # four bits
        nibbles = _nibbles(weight.device)[number]
        if bool((nibbles < 0).any()):
            row = start + int((nibbles < 0).any(1).nonzero()[0, 0])
            raise ValueError(f"row {row} keeps more than 2 of 4, so it is not 2:4 (-0.0 counts as kept)")
        if keep is not None and bool((stored & ~kept).any()):
            raise ValueError("the keep-mask leaves out a weight that is not zero")
        four = some.view(torch.int64)  # the bits of a group
        first, second = four >> 16 * (nibbles & 3) & 0xFFFF, four >> 16 * (nibbles >> 2) & 0xFFFF
        yield rows, (first | second << 16).to(torch.int32), nibbles


def _nibbles(device: torch.device) -> Tensor:
    """int32 (16,): kept places, a bit for each → i0 | i1 << 2, filled up with the lowest free ones; -1 beyond two."""
    table = list[int]()
    for number in range(16):
        kept = [place for place in range(4) if number >> place & 1]
        free = [place for place in range(4) if place not in kept]
        first, second, *more = sorted(kept + free[: max(2 - len(kept), 0)])
        table.append(-1 if more else first | second << 2)
    return torch.tensor(table, dtype=torch.int32, device=device)


def _dense(words: Tensor, nibbles: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Pairs and nibbles, each (≥ N, ≥ K/4), → (N, K)."""
    words, nibbles = words[: shape[0], : shape[1] // 4], nibbles[: shape[0], : shape[1] // 4]
    first, second = words.long() & 0xFFFF, words.long() >> 16 & 0xFFFF
    four = first << 16 * (nibbles & 3) | second << 16 * (nibbles >> 2)  # int64: the bits of a group
    return four.view(dtype)


def _joined(nibbles: Tensor) -> Tensor:
    """int32 (…, n) → (…): n nibbles of an int32, the first lowest."""
    shifts = torch.arange(0, 4 * nibbles.shape[-1], 4, dtype=torch.int32, device=nibbles.device)
    return (nibbles << shifts).sum(-1, dtype=torch.int32)  # the bits are apart, so that a sum is an or


def _split(words: Tensor, count: int) -> Tensor:
    """int32 (…) → (…, count): the nibbles of each."""
    return words.unsqueeze(-1) >> torch.arange(0, 4 * count, 4, dtype=torch.int32, device=words.device) & 15


def _padded(matrix: Tensor, tall: int, wide: int) -> Tensor:
    n, k = matrix.shape
    return torch.nn.functional.pad(matrix, (0, _up(k, wide) - k, 0, _up(n, tall) - n)).contiguous()


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
