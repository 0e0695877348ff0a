"""Erdős–Rényi densities (Mocanu et al. 2018, arXiv:1707.04780; the kernel form: Evci et al. 2020, arXiv:1911.11134).

The density of a matrix is in proportion to (in + out) / (in · out): small matrices, and long ones, keep more. The kernel
form adds the sides of the kernel, 1 and 1 of a matrix, and so nearly says the same. Shapes say everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmsparse.pruning.allocation.protocol import Unit
from llmsparse.sparsity.stats import Statistic


@dataclass(frozen=True)
class ErdosRenyi:
    """Density ∝ (in + out) / (in · out)."""

    @property
    def needs(self) -> None:
        return None

    @property
    def looks(self) -> bool:
        return False

    @property
    def sides(self) -> int:
        """Of the kernel."""
        return 0

    def look(self, weight: Tensor, stat: Statistic | None) -> None: ...

    def judge(self, seen: Sequence[Any]) -> float:
        return 0.0

    def sparsities(self, judged: Sequence[float], units: Sequence[Unit], sparsity: float) -> list[float]:
        """A unit that would keep more than all of itself is dense, and the others share the rest."""
        sums = [sum(sum(shape) + self.sides for shape in unit.shapes) for unit in units]
        densities = [total / unit.numel for total, unit in zip(sums, units, strict=True)]
        kept = (1 - sparsity) * sum(unit.numel for unit in units)
        order = sorted(range(len(units)), key=lambda index: -densities[index])
        left, found = sum(sums), [0.0] * len(units)
        for index in order:
            density = min(1.0, densities[index] * kept / left)
            found[index] = 1 - density
            kept -= density * units[index].numel
            left -= sums[index]
        return found


@dataclass(frozen=True)
class ErdosRenyiKernel(ErdosRenyi):
    """Density ∝ (in + out + 1 + 1) / (in · out)."""

    @property
    def sides(self) -> int:
        return 2
