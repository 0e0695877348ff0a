"""Every op of this package as a sentence of plain torch: the specification, and the oracle of the tests.

Written for reading, not for speed. Symbols: x (M, K), weight (N, K), `keep` (N, K) bool, True survives. A *group* is
four consecutive inputs of a row; 2:4 keeps two places of every group. Values have 16 bits (fp16 or bf16) and move as
their bit pattern, so that -0.0 and NaN come back as they were.

Rows (select24, join24): a group's two values side by side, and a nibble `i0 | i1 << 2` with i0 < i1 for their places;
eight nibbles make an int32, the first group in the lowest bits.

Fragments (mma24): what each lane of a warp holds for `mma.sp.m16n8k32`, in the order in which it loads them. A *tile*
is 16 rows × 32 inputs, lane = 4·g + t.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PLACES = (0, 1, 2, 3)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K), weight (N, K), bias (N,) → (M, N) in x's dtype: summed in float64, rounded once."""
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def stacked(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """x (M, K), weights (N_i, K), biases (N_i,) or None → what each gives alone, (M, N_i)."""
    return tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def experts(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    """x (T, D), gate and up (E, N, D), down (E, D, N), index and shares (T, K) → (T, D) in x's dtype: summed in float64,
    rounded once. An index that is no expert adds nothing."""
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for t, row in enumerate(index.tolist()):
        for k, e in enumerate(row):
            if 0 <= e < len(gate):
                g, u = gate[e].double() @ x[t].double(), up[e].double() @ x[t].double()  # (N,)
                y[t] += shares[t, k].double() * (down[e].double() @ (g * g.sigmoid() * u))
    return y.to(x.dtype)


def absorb(entering: Tensor, weight: Tensor, m: Tensor, keep: Tensor) -> Tensor:
    """entering, weight, keep (columns, rows), m (columns, columns) unit lower triangular → what each column loses."""
    lost = torch.zeros_like(weight)
    for j in range(len(weight)):
        lost[j] = weight[j] - (entering[j] + m[j, :j] @ lost[:j]) * keep[j]
    return lost


def absorb_groups(entering: Tensor, weight: Tensor, m: Tensor, scale: Tensor, n: int, of: int) -> tuple[Tensor, Tensor]:
    """The same where `n` of every `of` columns are kept, those of the largest (w + u)² D², and this mask."""
    lost, keep = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    for a in range(0, len(weight), of):
        b = a + of
        arrived = entering[a:b] + m[a:b, :a] @ lost[:a]
        u = torch.linalg.solve_triangular(m[a:b, a:b], arrived - weight[a:b], upper=False, unitriangular=True)
        score = ((weight[a:b] + u) * scale[a:b, None]).square()
        order = score.sort(dim=0, stable=True).indices  # of equal ones the first is the least important
        keep[a:b].scatter_(0, order[of - n :], True)
        lost[a:b] = absorb(arrived, weight[a:b], m[a:b, a:b], keep[a:b])
    return lost, keep


def stored(weight: Tensor) -> Tensor:
    """(N, K) bool: every place whose bits are not all 0. -0.0 and NaN are stored."""
    return weight.view(torch.int16) != 0


def mask24(weight: Tensor) -> Tensor:
    """(N, K) bool: the two of largest magnitude in every group; of equal ones, those further left."""
    groups = weight.float().abs().unflatten(1, (-1, 4))  # (N, K/4, 4)
    first = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, first, True).flatten(1)


def fill24(keep: Tensor) -> Tensor:
    """(N, K) bool with exactly two places in every group: the lowest free ones are added where fewer were kept."""
    filled = keep.clone().unflatten(1, (-1, 4))  # (N, K/4, 4)
    for place in PLACES:
        filled[..., place] |= filled.sum(-1) < 2
    return filled.flatten(1)


def rows24(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N, K/2) in the weight's dtype and places int32 (N, K/32). K a multiple of 32, at most two kept a group."""
    n, k = weight.shape
    filled = fill24(keep).view(n, k // 4, 4)
    values = (weight.view(torch.int16) * keep)[filled.view(n, k)].view(weight.dtype).view(n, k // 2)
    places = filled.nonzero()[:, 2].view(n, k // 32, 8, 2)
    nibbles = places[..., 0] | places[..., 1] << 2  # int64 (N, K/32, 8)
    words = (nibbles << 4 * torch.arange(8, device=weight.device)).sum(-1)
    return values, words.to(torch.int32)  # wraps to negative where bit 31 is set


def dense24(values: Tensor, places: Tensor) -> Tensor:
    """The weight (N, K) of `rows24`."""
    n, k = values.shape[0], values.shape[1] * 2
    nibbles = places.unsqueeze(-1) >> 4 * torch.arange(8, device=places.device)  # (N, K/32, 8)
    index = torch.stack((nibbles & 3, nibbles >> 2 & 3), -1).view(n, k // 4, 2)
    pairs = values.view(torch.int16).view(n, k // 4, 2)
    return pairs.new_zeros(n, k // 4, 4).scatter_(-1, index.long(), pairs).view(values.dtype).view(n, k)


def pack24(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """vals int32 (N/16, K/32, 32, 4) and meta int32 (N/16, K/256, 32, 4). N a multiple of 16, K of 256.

    PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16/.bf16 types": register r of lane (g, t) holds the two
    values of row g + 8·(r & 1), group 4·(r >> 1) + t of its tile. Metadata word j of a lane serves tiles 2j and 2j + 1
    of eight: the lanes with t >> 1 = s are read by `selector` s; low half row g, high half row g + 8, a nibble for each
    of the groups 4·(t & 1) … + 3.
    """
    n, k = weight.shape
    values, places = rows24(weight, keep)
    words = values.view(torch.int32)  # (N, K/4): the two values of a group
    nibbles = (places.unsqueeze(-1) >> 4 * torch.arange(8) & 15).view(n, k // 4)  # (N, K/4)
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4

    row, col, reg = torch.arange(n // 16), torch.arange(k // 32), torch.arange(4)
    rows = 16 * row[:, None, None, None] + g[:, None] + 8 * (reg & 1)
    groups = 8 * col[:, None, None] + 4 * (reg >> 1) + t[:, None]
    vals = words[rows, groups]  # (N/16, K/32, 32, 4)

    meta = torch.zeros(n // 16, k // 256, 32, 4, dtype=torch.int64)
    tile = 8 * torch.arange(k // 256)[:, None, None] + 2 * reg + (t >> 1)[:, None]  # (K/256, 32, 4)
    for half in (0, 1):
        for nibble in range(4):
            rows = 16 * row[:, None, None, None] + g[:, None] + 8 * half
            groups = 8 * tile + 4 * (t & 1)[:, None] + nibble
            meta |= nibbles[rows, groups].long() << (16 * half + 4 * nibble)
    return vals, meta.to(torch.int32)


def pack_x(x: Tensor) -> Tensor:
    """x (M, K), K a multiple of 32 → int32 (⌈M/8⌉, K/32, 32, 4): register r of lane (n, t) holds inputs 8·r + 2·t and
    the next one of token n (PTX ISA, fragment B of the same instruction). Missing tokens are 0."""
    m, k = x.shape
    padded = x.new_zeros(-(-m // 8) * 8, k)
    padded[:m] = x
    words = padded.view(torch.int32)  # (M, K/2)
    lane, tile, col, reg = torch.arange(32), torch.arange(len(padded) // 8), torch.arange(k // 32), torch.arange(4)
    tokens = 8 * tile[:, None, None, None] + (lane // 4)[:, None]
    return words[tokens, 16 * col[:, None, None] + 4 * reg + (lane % 4)[:, None]]


def split24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(two, rest), both (N, K): the two largest of every group, and all else. Their bits, added, are the weight's."""
    bits, mask = weight.view(torch.int16), mask24(weight)
    return (bits * mask).view(weight.dtype), (bits * ~mask).view(weight.dtype)


def bitmask(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kept values (nnz,) in row order, mask words int32 (N, C·8), starts (N, C) of each chunk of 256 columns in values.
    Bit c % 32 of word c // 32 is column c; columns that fill up the last chunk are 0."""
    n, k = weight.shape
    padded = torch.zeros(n, -(-k // 256) * 256, dtype=torch.bool)
    padded[:, :k] = keep
    words = (padded.view(n, -1, 32).long() << torch.arange(32)).sum(-1).to(torch.int32)  # bit 31 wraps to negative
    counts = padded.view(n, -1, 256).sum(-1)  # (N, C)
    return weight[keep], words, counts.flatten().cumsum(0).view(counts.shape) - counts


def nested(q: Tensor, steps: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) of small integers q and steps (N, ⌈K/group⌉): step · q in float32, rounded once to `dtype`."""
    column = torch.arange(q.shape[1])
    return (q.float() * steps.float()[:, column // group]).to(dtype)


def nested_codes(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Words int32 (N, C, 16) of two bits a column, the numbers that are not 0, +1 or -1 in row order, and where among these
    each chunk of 256 columns begins, (N, C). Columns that fill up the last chunk are 0."""
    n, k = q.shape
    padded = torch.zeros(n, -(-k // 256) * 256, dtype=torch.int64)
    padded[:, :k] = q
    code = torch.full_like(padded, 3)
    for number, small in enumerate((0, 1, -1)):
        code[padded == small] = number
    words = (code.view(n, -1, 16, 16) << 2 * torch.arange(16)).sum(-1).to(torch.int32)  # bit 31 wraps to negative
    counts = (code == 3).view(n, -1, 256).sum(-1)
    return words, padded[code == 3].to(torch.int8), counts.flatten().cumsum(0).view(counts.shape) - counts


def gaps(columns: list[int]) -> list[tuple[int, bool]]:
    """What a row of a segment stores in the sell layout, for its kept columns in order: (gap, is there a value).
    Gaps have four bits; wider ones are bridged. The first counts from the segment's begin."""
    entries, at = list[tuple[int, bool]](), 0
    for column in columns:
        while column - at > 15:
            entries.append((15, False))
            at += 15
        entries.append((column - at, True))
        at = column
    return entries
