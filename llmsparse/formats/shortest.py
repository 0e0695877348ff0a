"""The code that writes a matrix of small integers in the fewest bits."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from llmsparse.formats.digits import WIDEST, Code, fours_bits

RARE = 0.35  # where more flags than that are set, fours do not save: four in a row are rarely all 0

COUNTED = 1 << 22  # numbers at a time: numpy counts copies of 8 bytes each


class Choice(NamedTuple):
    """Widths of the levels from one on, which of them are in fours (counted from the first of these), and bits in all."""

    bits: int
    digits: tuple[int, ...] = ()
    fours: tuple[int, ...] = ()

    def after(self, bits: int, width: int, fours: bool = False) -> Choice:
        """This behind a level of `width`, whose items take `bits`."""
        later = tuple(level + 1 for level in self.fours)
        return Choice(self.bits + bits, (width, *self.digits), (0, *later) if fours else later)


def shortest_code(q: Any) -> tuple[Code, int]:
    """The shortest code of int8 (items,) by dynamic programming over the largest number that each level ends at, and the
    bits it takes, but for what fills up bytes. Of equal ones the first."""
    search = _Search(np.abs(q.reshape(-1)).view(np.uint8))  # |-128| is -128, which these bits are not
    best = search.first()
    return Code(best.digits, frozenset(best.fours)), best.bits


def histogram(numbers: Any) -> Any:
    """How many of uint8 numbers (items,) are 0, 1, … 255."""
    parts = (numbers[start : start + COUNTED] for start in range(0, len(numbers), COUNTED))
    return sum((np.bincount(part, minlength=256) for part in parts), np.zeros(256, np.int64))


class _Search:
    def __init__(self, magnitude: Any) -> None:
        self.magnitude = magnitude
        self.most = int(magnitude.max(initial=0))
        self.rest: dict[int, Choice] = {}

    @cached_property
    def above(self) -> list[int]:
        """above[m]: how many magnitudes are larger than m."""
        counts = histogram(self.magnitude)[: self.most + 1]
        return [*(counts.sum() - counts.cumsum()).tolist(), 0]

    def first(self) -> Choice:
        count, options = len(self.magnitude), list[Choice]()
        for width in range(1, WIDEST + 1):
            reached = 2 ** (width - 1) - 1
            if width > 1 and reached >= self.most:
                options.append(Choice(count * width, (width,)))
                break
            signed = self.signed(reached)
            options.append(signed.after(count * width, width))
            if width == 1 and self.above[0] <= RARE * count:
                options.append(signed.after(fours_bits(self.magnitude > 0), width, fours=True))
        return min(options, key=lambda option: option.bits)

    def signed(self, reached: int) -> Choice:
        """From the second level on, with all magnitudes above `reached` to write."""
        count, options = self.above[reached] if reached < self.most else 0, list[Choice]()
        for width in range(1, WIDEST + 1):
            if 2 ** (width - 1) >= self.most - reached:
                options.append(Choice(count * width, (width,)))
                break
            options.append(self.later(reached + 2 ** (width - 1) - 1).after(count * width, width))
        return min(options, key=lambda option: option.bits)

    def later(self, reached: int) -> Choice:
        """From the third level on, all magnitudes above `reached` with known signs."""
        if reached in self.rest:
            return self.rest[reached]
        count, options = self.above[reached], list[Choice]()
        for width in range(1, WIDEST + 1):
            last = 2**width >= self.most - reached
            behind = Choice(0) if last else self.later(reached + 2**width - 1)
            options.append(behind.after(count * width, width))
            if width == 1 and self.above[reached + 1] <= RARE * count:
                flags = self.magnitude[self.magnitude > reached] > reached + 1
                options.append(behind.after(fours_bits(flags), width, fours=True))
            if last:
                break
        self.rest[reached] = min(options, key=lambda option: option.bits)
        return self.rest[reached]
