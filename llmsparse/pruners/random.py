"""Random pruning (Liu et al., ICLR 2022, arXiv:2202.02643): the baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.pruners.protocol import Pruned
from llmsparse.sparsity.patterns import Pattern, Scope
from llmsparse.sparsity.stats import Statistic


@dataclass(frozen=True)
class Random:
    """Every mask of the pattern is equally likely; drawn on the CPU, so that a seed means the same on every device."""

    @property
    def scope(self) -> Scope:
        return "matrix"

    @property
    def needs(self) -> type[Statistic] | None:
        return None

    def workspace(self, out: int, width: int) -> int:
        """Scores in fp64, their partition, and the mask: 17 bytes a weight."""
        return 17 * out * width

    def __call__(self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator) -> Pruned:
        score = torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        keep = pattern.keep(score, slice(0, weight.shape[1]), weight.shape[1])
        return Pruned.of(weight, keep)
