"""AlphaPruning (Lu et al., NeurIPS 2024, arXiv:2410.10912): matrices whose spectrum has a heavy tail are well trained and
keep more. Looks at weights alone.

The exponent of the tail is Hill's estimate behind the smallest eigenvalue that fits best among those around the peak of
their histogram. Differs from the released code in that window's lower end, which there is a logarithm compared with an
eigenvalue and shuts nothing out.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.pruning.allocation.protocol import Unit, weighted_mean
from llmsparse.sparsity.stats import Statistic

BINS = 100  # of the logarithms of eigenvalues
AROUND_PEAK = (0.95, 1.5)  # times the peak, where the tail may begin
LEAST = 1e-5  # an eigenvalue below is none


@dataclass(frozen=True)
class AlphaPruning:
    """`spread`: ε, sparsities are in proportion to numbers between 1 − ε and 1 + ε."""

    spread: float = 0.2

    @property
    def needs(self) -> None:
        return None

    @property
    def looks(self) -> bool:
        return True

    def look(self, weight: Tensor, stat: Statistic | None) -> float:
        return tail_exponent(weight.to(torch.float32))

    def judge(self, seen: Sequence[float]) -> float:
        """The mean exponent of its matrices."""
        return sum(seen) / len(seen)

    def sparsities(self, judged: Sequence[float], units: Sequence[Unit], sparsity: float) -> list[float]:
        low, high = min(judged), max(judged)
        if high == low:
            return [sparsity] * len(units)
        shares = [1 - self.spread + 2 * self.spread * (alpha - low) / (high - low) for alpha in judged]
        mean = weighted_mean(shares, units)
        return [sparsity * share / mean for share in shares]


def tail_exponent(weight: Tensor) -> float:
    """α of the eigenvalues of WᵀW, whose tail falls as λ^−α; `weight` (out, in) fp32."""
    small = weight if weight.shape[0] <= weight.shape[1] else weight.T
    eigenvalues = torch.linalg.eigvalsh(small.double() @ small.double().T)  # ascending
    eigenvalues = eigenvalues[eigenvalues > LEAST]
    if len(eigenvalues) < 2:
        return 1.0
    begin, end = (factor * _peak(eigenvalues) for factor in AROUND_PEAK)
    best, alpha = torch.inf, 1.0
    for index in range(len(eigenvalues) - 1):
        least = eigenvalues[index]
        if not begin <= least <= end:
            continue
        tail = eigenvalues[index:] / least
        n = len(tail)
        found = 1 + n / tail.log().sum().item()
        ranks = torch.arange(n, dtype=torch.float64, device=tail.device) / n
        distance = (1 - tail.pow(1 - found) - ranks).abs().max().item()  # Kolmogorov–Smirnov
        if distance < best:
            best, alpha = distance, found
    return alpha


def _peak(eigenvalues: Tensor) -> float:
    """The eigenvalue where the histogram of their logarithms is highest: the left end of that bin."""
    logs = eigenvalues.log10()
    low, high = logs.min().item(), logs.max().item()
    counts = torch.histc(logs, BINS, low, high)
    return 10 ** (low + int(counts.argmax()) * (high - low) / BINS)
