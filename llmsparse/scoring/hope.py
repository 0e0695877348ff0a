"""HOPE: the set of experts whose loss adds up to least, pairs that run together counted as pairs (arXiv 2609.18916).

With F_ij the sum over tokens sent to both of g_i‖f_i‖ g_j‖f_j‖, what is lost with the experts of p ∈ {0, 1}ᴱ is bounded by
pᵀFp. The best p of a given size is sought by relaxing it to [0, 1]ᴱ, where the problem is convex, rounding, and then
swapping one expert for another, always the swap that gains most, until none does. The same is done from three other
beginnings; the best end counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RELAXATION_STEPS = 400
BISECTIONS = 60


def least_loss(pairs: Tensor, spans: Sequence[tuple[Sequence[int], int]]) -> Tensor:
    """The numbers of the experts to take out, ascending, for the least pᵀFp that swaps lead to.

    `pairs` (E, E) float64 on the CPU, symmetric and positive semi-definite; `spans`: experts to choose among, and how many
    of them go, for each part of the router's choice. Whoever is in no span stays.
    """
    members = [torch.tensor(list(span), dtype=torch.int64) for span, _ in spans]
    counts = [count for _, count in spans]
    scale = float(pairs.diagonal().max()) if len(pairs) else 0.0
    matrix = pairs / scale if scale > 0 else pairs
    relaxed = _relaxed(matrix, members, counts)
    starts = [_rounded(-relaxed, members, counts), _rounded(matrix.diagonal(), members, counts)]
    starts += [_grown(matrix, members, counts), _shrunk(matrix, members, counts)]
    ends = [_swapped(matrix, start, members) for start in starts]
    best = min(ends, key=lambda chosen: loss(matrix, chosen))
    return best.nonzero()[:, 0]


def loss(pairs: Tensor, chosen: Tensor) -> float:
    """pᵀFp of a bool or numeric p (E,)."""
    p = chosen.to(pairs)
    return float(p @ pairs @ p)


def _relaxed(matrix: Tensor, members: list[Tensor], counts: list[int]) -> Tensor:
    """argmin pᵀFp over 0 ≤ p ≤ 1 with the sum of each span given: projected gradient steps with momentum (FISTA)."""
    steepest = float(torch.linalg.matrix_norm(matrix, 2)) if len(matrix) else 0.0
    p = torch.zeros(len(matrix), dtype=matrix.dtype)
    for span, count in zip(members, counts, strict=True):
        p[span] = count / max(1, len(span))
    ahead, momentum = p, 1.0
    for _ in range(RELAXATION_STEPS if steepest > 0 else 0):
        new = torch.zeros_like(p)
        step = ahead - matrix @ ahead / steepest
        for span, count in zip(members, counts, strict=True):
            new[span] = _projected(step[span], count)
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / grown * (new - p)
        p, momentum = new, grown
    return p


def _projected(v: Tensor, total: int) -> Tensor:
    """The nearest point to v with 0 ≤ p ≤ 1 and Σ p = total: clip(v − t, 0, 1), t by bisection."""
    low, high = v.min() - 1, v.max()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if (v - middle).clamp(0, 1).sum() > total:
            low = middle
        else:
            high = middle
    return (v - high).clamp(0, 1)


def _rounded(importance: Tensor, members: list[Tensor], counts: list[int]) -> Tensor:
    """The least important of each span."""
    chosen = torch.zeros(len(importance), dtype=torch.bool)
    for span, count in zip(members, counts, strict=True):
        chosen[span[importance[span].argsort(stable=True)[:count]]] = True
    return chosen


def _grown(matrix: Tensor, members: list[Tensor], counts: list[int]) -> Tensor:
    """One expert after the other goes, always the one that adds least."""
    chosen = torch.zeros(len(matrix), dtype=torch.bool)
    for span, count in zip(members, counts, strict=True):
        for _ in range(count):
            added = 2 * matrix[:, chosen].sum(1) + matrix.diagonal()
            left = span[~chosen[span]]
            chosen[left[added[left].argmin()]] = True
    return chosen


def _shrunk(matrix: Tensor, members: list[Tensor], counts: list[int]) -> Tensor:
    """All go, and one after the other comes back, always the one whose loss weighs most."""
    chosen = torch.zeros(len(matrix), dtype=torch.bool)
    for span in members:
        chosen[span] = True
    for span, count in zip(members, counts, strict=True):
        for _ in range(len(span) - count):
            saved = 2 * matrix[:, chosen].sum(1) - matrix.diagonal()
            gone = span[chosen[span]]
            chosen[gone[saved[gone].argmax()]] = False
    return chosen


def _swapped(matrix: Tensor, chosen: Tensor, members: list[Tensor]) -> Tensor:
    """Swaps within a span, the best one each time, until none lowers pᵀFp."""
    chosen = chosen.clone()
    diagonal = matrix.diagonal()
    least = -1e-12 * max(1.0, loss(matrix, chosen))
    while True:
        sums = matrix[:, chosen].sum(1)  # F p
        best, swap = least, None
        for span in members:
            inside, outside = span[chosen[span]], span[~chosen[span]]
            if len(inside) == 0 or len(outside) == 0:
                continue
            # p − e_i + e_j changes the loss by 2 (Fp)_j − 2 (Fp)_i + F_ii + F_jj − 2 F_ij
            change = (2 * sums + diagonal)[outside][None] - (2 * sums - diagonal)[inside][:, None]
            change = change - 2 * matrix[inside][:, outside]
            place = int(change.argmin())
            if float(change.flatten()[place]) < best:
                best = float(change.flatten()[place])
                swap = int(inside[place // len(outside)]), int(outside[place % len(outside)])
        if swap is None:
            return chosen
        chosen[swap[0]], chosen[swap[1]] = False, True
