"""OWL (Yin et al., ICML 2024, arXiv:2310.05175): blocks with many outliers among their Wanda scores keep more.

Differs from the released code in the mean that is subtracted, which is over weights and not over blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.pruning.allocation.protocol import Unit, around
from llmsparse.sparsity.stats import InputNorm, Statistic


@dataclass(frozen=True)
class OWL:
    """`outlier`: times the mean score, above which a score is one; `spread`: the most that a sparsity moves, about."""

    outlier: float = 5.0
    spread: float = 0.08

    @property
    def needs(self) -> type[InputNorm]:
        return InputNorm

    @property
    def looks(self) -> bool:
        return True

    def look(self, weight: Tensor, stat: Statistic | None) -> tuple[Tensor, Tensor]:
        """The weight itself and the norms of its inputs: the mean that counts is that of the whole unit."""
        assert isinstance(stat, InputNorm)
        return weight, stat.norm

    def judge(self, seen: Sequence[tuple[Tensor, Tensor]]) -> float:
        """D = 100 · mean(A > outlier · mean(A)), A_ij = |W_ij| · ‖X_j‖₂ over all weights of the unit."""
        numel = sum(weight.numel() for weight, _ in seen)
        mean = sum(_scores(weight, norm).sum(dtype=torch.float64).item() for weight, norm in seen) / numel
        above = sum(int((_scores(weight, norm) > self.outlier * mean).sum()) for weight, norm in seen)
        return 100 * above / numel

    def sparsities(self, judged: Sequence[float], units: Sequence[Unit], sparsity: float) -> list[float]:
        return around(judged, units, sparsity, self.spread)


def _scores(weight: Tensor, norm: Tensor) -> Tensor:
    return weight.to(norm.device, torch.float32).abs() * norm  # (out, in)
