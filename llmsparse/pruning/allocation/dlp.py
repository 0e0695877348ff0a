"""DLP (Chen et al., ICML 2025): blocks whose Wanda scores are small on the mean keep more, relative to all blocks.

As in the released code the mean of the scores counts, where the paper writes the median.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.pruning.allocation.protocol import Unit, around
from llmsparse.sparsity.stats import InputNorm, Statistic


@dataclass(frozen=True)
class DLP:
    """`spread`: the most that a sparsity moves, about."""

    spread: float = 0.15

    @property
    def needs(self) -> type[InputNorm]:
        return InputNorm

    @property
    def looks(self) -> bool:
        return True

    def look(self, weight: Tensor, stat: Statistic | None) -> tuple[float, int]:
        assert isinstance(stat, InputNorm)
        columns = weight.to(stat.norm.device, torch.float32).abs().sum(dim=0, dtype=torch.float64)  # (in,)
        return (columns * stat.norm).sum().item(), weight.numel()

    def judge(self, seen: Sequence[tuple[float, int]]) -> float:
        """m = mean of |W_ij| · ‖X_j‖₂."""
        return sum(total for total, _ in seen) / sum(numel for _, numel in seen)

    def sparsities(self, judged: Sequence[float], units: Sequence[Unit], sparsity: float) -> list[float]:
        """I_l = 1 − m_l / Σ m."""
        total = sum(judged)
        if total == 0:
            return [sparsity] * len(units)
        return around([1 - mean / total for mean in judged], units, sparsity, self.spread)
