"""What an allocation is: a function from what one pass over the dense model leaves to a sparsity for each unit.

A unit is what shares one sparsity: a block, a projection of it (with all its experts), or a single weight. An allocation
says what it would like; bounds and the exact total are `exact.py`'s business, the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from torch import Tensor

from llmsparse.sparsity.stats import Statistic

Shape = tuple[int, int]  # (out, in)


@dataclass(frozen=True)
class Unit:
    """What gets one sparsity: its name, and the shapes of its weights."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def numel(self) -> int:
        return sum(prod(shape) for shape in self.shapes)


class Allocation(Protocol):
    """A frozen dataclass; its fields are its options in a recipe."""

    @property
    def needs(self) -> type[Statistic] | None:
        """What it wants to know of the input of a weight; None where it looks at no activations."""
        ...

    @property
    def looks(self) -> bool:
        """Whether it looks at weights at all; otherwise shapes say everything."""
        ...

    def look(self, weight: Tensor, stat: Statistic | None) -> Any:
        """What to remember of one weight (out, in), in any float dtype, until its unit is complete."""
        ...

    def judge(self, seen: Sequence[Any]) -> float:
        """A number for a unit of what `look` made of each of its weights."""
        ...

    def sparsities(self, judged: Sequence[float], units: Sequence[Unit], sparsity: float) -> list[float]:
        """The fraction of zeros that it would like for each unit, about `sparsity` overall; bounded by nothing."""
        ...


@dataclass(frozen=True)
class Uniform:
    """The same for all."""

    needs: None = None
    looks: bool = False

    def look(self, weight: Tensor, stat: Statistic | None) -> None: ...

    def judge(self, seen: Sequence[Any]) -> float:
        return 0.0

    def sparsities(self, judged: Sequence[float], units: Sequence[Unit], sparsity: float) -> list[float]:
        return [sparsity] * len(units)


def weighted_mean(values: Sequence[float], units: Sequence[Unit]) -> float:
    """Over all weights of all units."""
    return sum(value * unit.numel for value, unit in zip(values, units, strict=True)) / sum(
        unit.numel for unit in units
    )


def around(importance: Sequence[float], units: Sequence[Unit], sparsity: float, spread: float) -> list[float]:
    """`sparsity` less what is more important: the range of `importance` becomes one of 2 · spread, its mean stays."""
    low, high = min(importance), max(importance)
    if high == low:
        return [sparsity] * len(units)
    kept = [2 * spread * (value - low) / (high - low) for value in importance]
    mean = weighted_mean(kept, units)
    return [sparsity + mean - value for value in kept]
