"""DSnoT, Dynamic Sparse no Training (Zhang et al., ICLR 2024, arXiv:2310.08915): swap pruned and kept weights of a row.

Starts from another method's mask and lowers the expected output error, known from the mean and variance of the inputs
alone. With ε_i = Σ_{j pruned} W_ij μ_j, the mean error of output i, each cycle regrows one weight and prunes another, in
the same row, or the same group for N:M, so that counts stay as they are.

`criterion="expected"`, the default, is not the paper's: its rule looks at ε alone, may raise the squared error, and as
released ruins narrow layers. Here a row takes the swap that most lowers E_i = ε_i² + Σ_{j pruned} W_ij² σ_j², the expected
squared error for uncorrelated inputs, and stops where none does: by this measure no row ends worse than it began.

`criterion="paper"` is the published rule. What the released code adds is not repeated: it skips every MLP, breaks N:M
and the count (it regrows weights that were never pruned), takes inputs that never vary for the best, and after SparseGPT
prunes the first columns. Its threshold is on a sum over one sequence; here it is in deviations of the pruned part.

After a method that updates weights, kept weights are the updated ones and regrown weights the original ones; the error is
then that of the whole row, W_ij - Ŵ_ij for a weight that is kept.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llmsparse.patterns import Pattern, Scope
from llmsparse.pruners.protocol import Pruned, Pruner
from llmsparse.pruners.wanda import Wanda
from llmsparse.stats import InputMoments, Statistic, combine

CANDIDATES = 128  # weights on either side of the mask's edge that a row's swaps are chosen from
ROUNDS = 3  # of choosing either side of a swap for the best of the other


@dataclass(frozen=True)
class DSnoT:
    """At most `max_cycles` swaps a row; `update_threshold` and `variance_power` belong to `criterion="paper"`."""

    initial: Pruner = field(default_factory=Wanda)
    max_cycles: int = 50
    update_threshold: float = 0.1
    variance_power: float = 1.0
    criterion: Literal["expected", "paper"] = "expected"

    @property
    def scope(self) -> Scope:
        return self.initial.scope

    @property
    def needs(self) -> type[Statistic] | None:
        return combine(self.initial.needs, InputMoments)

    def __call__(
        self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator
    ) -> Pruned:
        assert isinstance(stat, InputMoments)
        start = self.initial(weight, stat, pattern, generator)
        row = _Rows(weight, torch.where(start.keep, start.weight, weight), start.keep.clone(), stat, pattern.span)
        swaps = self._swap(row) if self.criterion == "expected" else self._swap_as_published(row)
        regrown = row.keep & ~start.keep
        return Pruned.of(torch.where(regrown, weight, start.weight), row.keep, **start.notes, swaps=swaps)

    def _swap(self, layer: _Rows) -> int:
        """Change `layer.keep` in place by the swaps that lower E most; returns their number."""
        index, valid = layer.candidates()
        error, total = layer.errors()  # ε (out,), E (out,)
        kept = layer.keep.gather(1, index)
        weight, value = layer.weight.gather(1, index).double(), layer.value.gather(1, index).double()
        mean, variance = layer.stat.mean.double()[index], layer.stat.variance.double()[index]
        dense = _Change(weight * mean, weight.square() * variance)
        change = _Change(value * mean, value * (2 * weight - value) * variance)  # w² - (w - ŵ)², times σ²
        rows, swaps = torch.arange(len(index), device=index.device), 0
        raise NotImplementedError


class _Change(NamedTuple):
    """What pruning a weight adds to its row's error, (rows, candidates) each; regrowing it takes the same away."""

    mean: Tensor
    variance: Tensor
