"""What is summed up of the experts of one block over the tokens of a text.

For a token x that is sent to expert j with gate g_j(x), which adds g_j(x) f_j(x) to the output, everything that the scores
of `scores.py` need are sums over tokens, in float64. Sums of texts add up: what is measured once, domain by domain, gives
the scores of any blend of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SUMS = ("tokens", "gates", "outputs", "additions", "pairs")


@dataclass
class ExpertStatistics:
    """Sums over the tokens of a text, float64, of E experts. `seen` counts all tokens, sent to whichever experts."""

    seen: float
    tokens: Tensor  # (E,) sent to the expert
    gates: Tensor  # (E,) Σ g
    outputs: Tensor  # (E,) Σ ‖f‖
    additions: Tensor  # (E,) Σ g‖f‖
    pairs: Tensor  # (E, E) Σ g_i‖f_i‖ g_j‖f_j‖ over tokens sent to both; Σ (g‖f‖)² on the diagonal
    peak: Tensor  # (E,) max ‖f‖

    @classmethod
    def empty(cls, experts: int, device: torch.device | None = None) -> ExpertStatistics:
        """Of no token."""
        shapes = {field.name: (experts,) for field in fields(cls) if field.name != "seen"} | {
            "pairs": (experts, experts)
        }
        return cls(
            0.0, **{name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        )

    @property
    def experts(self) -> int:
        return len(self.tokens)

    def add(self, index: Tensor, gates: Tensor, norms: Tensor) -> None:
        """Take in tokens: the numbers of the experts each is sent to (tokens, k), its gates and ‖f‖ (tokens, k).

        A number beyond the last expert stands for none.
        """
        there = index < self.experts
        index = index.where(there, 0)
        sent, g, f = (value.double() * there for value in (torch.ones_like(gates), gates, norms))
        self.seen += len(index)
        for name, value in (("tokens", sent), ("gates", g), ("outputs", f), ("additions", g * f)):
            getattr(self, name).index_add_(0, index.flatten(), value.flatten())
        added = torch.zeros(len(index), self.experts, dtype=torch.float64, device=index.device)
        added.scatter_add_(1, index, g * f)
        self.pairs += added.T @ added
        self.peak.scatter_reduce_(0, index.flatten(), f.flatten(), "amax")

    def scaled(self, factor: float) -> ExpertStatistics:
        """All sums times a factor; the peak is no sum."""
        sums = {name: getattr(self, name) * factor for name in SUMS}
        return ExpertStatistics(self.seen * factor, **sums, peak=self.peak.clone())

    def plus(self, other: ExpertStatistics) -> ExpertStatistics:
        """Of both texts together."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        return ExpertStatistics(self.seen + other.seen, **sums, peak=torch.maximum(self.peak, other.peak))

    def cpu(self) -> ExpertStatistics:
        return ExpertStatistics(self.seen, **{name: getattr(self, name).cpu() for name in (*SUMS, "peak")})


def of_both(one: Mapping[str, ExpertStatistics], other: Mapping[str, ExpertStatistics]) -> dict[str, ExpertStatistics]:
    """Text by text, the sums of earlier and of later batches."""
    return {**other, **one, **{text: one[text].plus(other[text]) for text in one.keys() & other.keys()}}


def blend(domains: Mapping[str, ExpertStatistics], weights: Mapping[str, float] | None = None) -> ExpertStatistics:
    """Of a text that holds the domains in the proportion of `weights` (all alike if not given), however long each was."""
    parts: Sequence[ExpertStatistics] = [
        statistics.scaled((weights[name] if weights is not None else 1.0) / max(statistics.seen, 1.0))
        for name, statistics in domains.items()
        if weights is None or weights.get(name, 0.0) > 0
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total.plus(part)
    return total
