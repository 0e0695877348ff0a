"""LSA, layerwise sparsity allocation by the least linear reconstruction error: what is larger of that error is pruned more.

The error is that of half the inputs of a row removed, chosen greedily so that it stays small. It grows with the
activations, and so with depth: late blocks keep less. Of a weight some rows stand for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.pruning.allocation.protocol import Unit, weighted_mean
from llmsparse.sparsity.stats import Gram, Statistic

ROWS = 128  # of a weight that stand for all, evenly spread


@dataclass(frozen=True)
class LSA:
    """`spread`: β of p_l = s + mean(d) − d_l, where d = 2 β I and I_l = 1 − E_l / Σ E."""

    spread: float = 0.15

    @property
    def needs(self) -> type[Gram]:
        return Gram

    @property
    def looks(self) -> bool:
        return True

    def look(self, weight: Tensor, stat: Statistic | None) -> float:
        assert isinstance(stat, Gram)
        rows = torch.linspace(0, weight.shape[0] - 1, min(ROWS, weight.shape[0])).round().long()
        chosen = weight[rows.to(weight.device)].to(stat.xtx.device, torch.float32)
        error = half_removed(chosen, stat.xtx / max(1, stat.tokens))
        return error * weight.shape[0] / len(rows)

    def judge(self, seen: Sequence[float]) -> float:
        return sum(seen)

    def sparsities(self, judged: Sequence[float], units: Sequence[Unit], sparsity: float) -> list[float]:
        total = sum(judged)
        if total == 0:
            return [sparsity] * len(units)
        kept = [2 * self.spread * (1 - error / total) for error in judged]
        mean = weighted_mean(kept, units)
        return [sparsity + mean - value for value in kept]


def half_removed(weight: Tensor, gram: Tensor) -> float:
    """Σ over rows of Σ_{i,j ∈ R} S_ij, S = H ∘ (wᵀw), R half of the columns: each time the one that adds least.

    `weight` (rows, in) fp32, `gram` (in, in) fp32.
    """
    rows, width = weight.shape
    every = torch.arange(rows, device=weight.device)
    adds = weight.square() * gram.diagonal()  # (rows, in): S_jj + 2 Σ_{i ∈ R} S_ij, what column j would add
    error = torch.zeros(rows, dtype=torch.float64, device=weight.device)
    for _ in range(width // 2):
        least = adds.argmin(dim=1)
        error += adds[every, least]
        adds += 2 * weight[every, least, None] * gram[least] * weight
        adds[every, least] = torch.inf
    return error.sum().item()
