"""What a pruning method is: a function of (weight, statistic, pattern)."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.sparsity.patterns import Pattern, Scope
from llmsparse.sparsity.stats import Statistic


class Pruned(NamedTuple):
    """`weight` (out, in) fp32, +0.0 wherever `keep` (out, in) bool is False; `notes` is what a report should tell."""

    weight: Tensor
    keep: Tensor
    notes: dict[str, float | int | str | bool]

    @classmethod
    def of(cls, weight: Tensor, keep: Tensor, **notes: float | int | str | bool) -> Pruned:
        """A copy of `weight` without what is not kept. Raises `NumericalError` where `weight` is NaN or Inf."""
        if not bool(weight.sum().isfinite()) and not bool(weight.isfinite().all()):
            broken = int((~weight.isfinite()).sum())
            raise NumericalError(f"{broken} of {weight.numel()} weights are NaN or Inf; check the checkpoint")
        return cls(weight.masked_fill(~keep, 0.0), keep, notes)


class Pruner(Protocol):
    """A frozen dataclass; its fields are its options in a recipe."""

    @property
    def scope(self) -> Scope:
        """What `scope: auto` means for an unstructured pattern."""
        ...

    @property
    def needs(self) -> type[Statistic] | None:
        """The poorest statistic it can work with; None if it looks at weights alone."""
        ...

    def __call__(self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator) -> Pruned:
        """Prune `weight` (out, in) fp32, which is left as it is.

        `stat` saw the weight's input and is of the kind `needs` names, or richer. `generator` is a CPU generator, seeded
        for this weight. Raises `NumericalError` for NaN or Inf, and `PatternError` where the pattern cannot cover the weight.
        """
        ...
