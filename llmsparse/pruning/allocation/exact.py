"""From what an allocation would like to what is possible: within bounds, to the exact total, in whole steps.

A weight is pruned in steps: single zeros where the sparsity counts over a matrix, a zero in every row where it counts over
rows, and whole levels where the pattern is N:M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST_DENSITY = 4  # a unit keeps at least the mean density over this, so that none is emptied
HALVINGS = 60


def bounds_of(sparsity: float) -> tuple[float, float]:
    """The least and the largest sparsity that a unit may get."""
    return 0.0, 1 - (1 - sparsity) / LEAST_DENSITY


def bounded(wished: Sequence[float], sizes: Sequence[int], sparsity: float, low: float, high: float) -> list[float]:
    """`wished` sparsities, all moved by one amount and cut off at the bounds, so that the total is `sparsity`.

    `low <= sparsity <= high`, which makes it possible. The order of the units stays.
    """
    total = sparsity * sum(sizes)

    def moved(shift: float) -> list[float]:
        return [min(high, max(low, wish + shift)) for wish in wished]

    least, most = low - max(wished), high - min(wished)  # all at the lower bound; all at the upper
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        zeros = sum(value * size for value, size in zip(moved(middle), sizes, strict=True))
        least, most = (middle, most) if zeros < total else (least, middle)
    return moved((least + most) / 2)


def in_steps(sparsities: Sequence[float], sizes: Sequence[int], steps: Sequence[int], zeros: int) -> list[int]:
    """Zeros for each weight of so many elements, each a multiple of its step, `zeros` in all, or as near as steps allow.

    By the largest remainder; of equals the first. None is empty: each keeps a step.
    """
    exact = [sparsity * size / step for sparsity, size, step in zip(sparsities, sizes, steps, strict=True)]
    most = [size // step - 1 for size, step in zip(sizes, steps, strict=True)]
    counts = [min(limit, math.floor(part)) for part, limit in zip(exact, most, strict=True)]
    missing = zeros - sum(count * step for count, step in zip(counts, steps, strict=True))
    order = sorted(range(len(counts)), key=lambda index: counts[index] - exact[index])
    while missing > 0:
        taken = [index for index in order if 2 * missing >= steps[index] and counts[index] < most[index]]
        if not taken:
            break
        for index in taken:
            if 2 * missing < steps[index]:
                continue
            counts[index] += 1
            missing -= steps[index]
    return [count * step for count, step in zip(counts, steps, strict=True)]


def to_levels(wished: Sequence[float], sizes: Sequence[int], levels: Sequence[float], sparsity: float) -> list[float]:
    """One of the `levels` for each unit, near what it wished, the total as near to `sparsity` as a single step allows.

    `levels` ascend, and `sparsity` lies between the first and the last.
    """
    total = sparsity * sum(sizes)
    found = [0] * len(wished)  # numbers of levels: all at the first, then the step that is wanted most, and so on
    steps = sorted(
        (
            ((levels[number] + levels[number + 1]) / 2 - wish, unit, number)
            for unit, wish in enumerate(wished)
            for number in range(len(levels) - 1)
        ),
    )
    zeros = levels[0] * sum(sizes)
    for _, unit, number in steps:  # of one unit in order: the middle between two levels ascends
        gain = (levels[number + 1] - levels[number]) * sizes[unit]
        if abs(zeros + gain - total) > abs(zeros - total):
            continue
        if found[unit] == number:
            found[unit] += 1
            zeros += gain
    return [levels[number] for number in found]
