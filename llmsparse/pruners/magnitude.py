"""Magnitude pruning (Han et al. 2015): the smallest weights go, whatever they are multiplied with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.pruners.protocol import Pruned
from llmsparse.sparsity.patterns import Pattern, Scope
from llmsparse.sparsity.stats import Statistic


@dataclass(frozen=True)
class Magnitude:
    """score = |W_ij|, compared over the whole matrix; needs no calibration."""

    @property
    def scope(self) -> Scope:
        return "matrix"

    @property
    def needs(self) -> type[Statistic] | None:
        return None

    def workspace(self, out: int, width: int) -> int:
        """fp32 scores, their partition and, where many are equal, the scores once more; two masks: 14 bytes a weight."""
        return 14 * out * width

    def __call__(self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator) -> Pruned:
        keep = pattern.keep(weight.abs(), slice(0, weight.shape[1]), weight.shape[1])
        return Pruned.of(weight, keep)
