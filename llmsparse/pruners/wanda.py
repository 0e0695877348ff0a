"""Wanda (Sun et al., ICLR 2024, arXiv:2306.11695): small weights on quiet inputs go; no weight is changed.

Differs from the released code in exact counts (that keeps `in - int(in * s)` a row). The norm is over all tokens, where
the released one is a mean over sequences: a common factor, the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.pruners.protocol import Pruned
from llmsparse.sparsity.patterns import Pattern, Scope
from llmsparse.sparsity.stats import InputNorm, Statistic


@dataclass(frozen=True)
class Wanda:
    """score = |W_ij| · ‖X_j‖₂, compared within each output's row."""

    @property
    def scope(self) -> Scope:
        return "row"

    @property
    def needs(self) -> type[InputNorm]:
        return InputNorm

    def workspace(self, out: int, width: int) -> int:
        """fp32 scores, |W| or their partition beside them, masks and ranks: at most 12 bytes a weight."""
        return 12 * out * width

    def __call__(self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator) -> Pruned:
        assert isinstance(stat, InputNorm)
        score = weight.abs() * stat.norm  # |W_ij| · ‖X_j‖₂   (eq. 1)
        keep = pattern.keep(score, slice(0, weight.shape[1]), weight.shape[1])
        return Pruned.of(weight, keep)
