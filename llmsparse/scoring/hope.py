"""HOPE: the set of experts whose loss adds up to least, pairs that run together counted as pairs (arXiv 2609.18916).

With F_ij the sum over tokens sent to both of g_i‖f_i‖ g_j‖f_j‖, what is lost with the experts of p ∈ {0, 1}ᴱ is bounded by
pᵀFp. The best p of a given size is sought by relaxing it to [0, 1]ᴱ, where the problem is convex, rounding, and then
swapping one expert for another, always the swap that gains most, until none does. The same is done from three other
beginnings; the best end counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

RELAXATION_STEPS = 400
STILL = 1e-9  # a step of the relaxation that moves nothing further than this is the last

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]
Span = tuple[NDArray[np.int64], int]  # experts, and how many of them go


def least_loss(pairs: Tensor, spans: Sequence[tuple[Sequence[int], int]]) -> list[int]:
    """The numbers of the experts to take out, ascending, for the least pᵀFp that swaps lead to.

    `pairs` (E, E) float64 on the CPU, symmetric and positive semi-definite; `spans`: experts to choose among, and how many
    of them go, for each part of the router's choice. Whoever is in no span stays.
    """
    matrix: Numbers = pairs.numpy()
    scale = float(matrix.diagonal().max(initial=0.0))
    matrix = matrix / scale if scale > 0 else matrix
    known: list[Span] = [(np.array(list(span), dtype=np.int64), count) for span, count in spans if len(span)]
    starts = [_rounded(-_relaxed(matrix, known), known), _rounded(matrix.diagonal(), known)]
    starts += [_grown(matrix, known), _shrunk(matrix, known)]
    ends = [_swapped(matrix, start, known) for start in starts]
    best = min(ends, key=lambda chosen: _loss(matrix, chosen))
    return np.flatnonzero(best).tolist()


def _loss(matrix: Numbers, chosen: Flags) -> float:
    return float(matrix[np.ix_(chosen, chosen)].sum())


def _relaxed(matrix: Numbers, spans: Sequence[Span]) -> Numbers:
    """argmin pᵀFp over 0 ≤ p ≤ 1 with the sum of each span given: projected gradient steps with momentum (FISTA)."""
    p: Numbers = np.zeros(len(matrix))
    for span, count in spans:
        p[span] = count / len(span)
    steepest = float(np.linalg.norm(matrix, 2)) if len(matrix) else 0.0
    ahead, momentum = p, 1.0
    for _ in range(RELAXATION_STEPS if steepest > 0 else 0):
        step = ahead - matrix @ ahead / steepest
        new: Numbers = np.zeros(len(matrix))
        for span, count in spans:
            new[span] = _projected(step[span], count)
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        moved = new - p
        ahead = new + (momentum - 1) / grown * moved
        p, momentum = new, grown
        if np.abs(moved).max(initial=0.0) < STILL:
            break
    return p


def _projected(v: Numbers, total: int) -> Numbers:
    """The nearest point to v with 0 ≤ p ≤ 1 and Σ p = total: clip(v − t, 0, 1), whose sum is linear in t between the places
    where some part of it is clipped."""
    bends = np.sort(np.concatenate([v, v - 1]))
    low, high = 0, len(bends) - 1  # the sum falls from len(v) to 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if np.clip(v - bends[middle], 0, 1).sum() >= total else (low, middle)
    over, under = (float(np.clip(v - bends[place], 0, 1).sum()) for place in (low, high))
    share = (over - total) / (over - under) if over > under else 0.0
    return np.clip(v - (bends[low] + share * (bends[high] - bends[low])), 0, 1)


def _rounded(importance: Numbers, spans: Sequence[Span]) -> Flags:
    """The least important of each span."""
    chosen: Flags = np.zeros(len(importance), dtype=bool)
    for span, count in spans:
        chosen[span[np.argsort(importance[span], kind="stable")[:count]]] = True
    return chosen


def _grown(matrix: Numbers, spans: Sequence[Span]) -> Flags:
    """One expert after the other goes, always the one that adds least."""
    chosen: Flags = np.zeros(len(matrix), dtype=bool)
    for span, count in spans:
        for _ in range(count):
            added = 2 * matrix[:, chosen].sum(1) + matrix.diagonal()
            left = span[~chosen[span]]
            chosen[left[added[left].argmin()]] = True
    return chosen


def _shrunk(matrix: Numbers, spans: Sequence[Span]) -> Flags:
    """All go, and one after the other comes back, always the one whose loss weighs most."""
    chosen: Flags = np.zeros(len(matrix), dtype=bool)
    for span, _ in spans:
        chosen[span] = True
    for span, count in spans:
        for _ in range(len(span) - count):
            saved = 2 * matrix[:, chosen].sum(1) - matrix.diagonal()
            gone = span[chosen[span]]
            chosen[gone[saved[gone].argmax()]] = False
    return chosen


def _swapped(matrix: Numbers, chosen: Flags, spans: Sequence[Span]) -> Flags:
    """Swaps within a span, the best one each time, until none lowers pᵀFp."""
    chosen, diagonal = chosen.copy(), matrix.diagonal()
    least = -1e-12 * max(1.0, _loss(matrix, chosen))  # what is gained by rounding alone is no gain
    while True:
        sums = matrix[:, chosen].sum(1)  # F p
        best, swap = least, None
        for span, _ in spans:
            inside, outside = span[chosen[span]], span[~chosen[span]]
            if len(inside) == 0 or len(outside) == 0:
                continue
            # p − e_i + e_j changes the loss by 2 (Fp)_j − 2 (Fp)_i + F_ii + F_jj − 2 F_ij
            change: Any = (2 * sums + diagonal)[outside][None] - (2 * sums - diagonal)[inside][:, None]
            change = change - 2 * matrix[np.ix_(inside, outside)]
            place = divmod(int(change.argmin()), len(outside))
            if change[place] < best:
                best, swap = float(change[place]), (inside[place[0]], outside[place[1]])
        if swap is None:
            return chosen
        chosen[swap[0]], chosen[swap[1]] = False, True
