"""What a pruning method is: a function of (weight, statistic, pattern)."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.sparsity.patterns import Pattern, Scope
from llmsparse.sparsity.stats import Gram, Statistic

USUAL_COPIES = (
    6  # of a weight in fp32 that a method is taken to need which does not say: scores, their sorting, results
)
USUAL_FACTORS = 3  # and of its Gram matrix, where it needs one: damped, factored, and what is made of the factor


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

    def workspace(self, out: int, width: int) -> int:
        """Bytes that pruning one weight (out, in) takes at its peak besides the weight in fp32 and its statistic: copies,
        scores, masks, sorting, what comes out, and factors that the statistic keeps for the next weight of its input.

        For a plan; a method without it still works, see `workspace_of`. No promise: counted from the code, held against
        real runs by tests/pruning/test_memory_estimate.py.
        """
        ...

    def __call__(self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator) -> Pruned:
        """Prune `weight` (out, in) fp32, which is left as it is.

        `stat` saw the weight's input and is of the kind `needs` names, or richer. `generator` is a CPU generator, seeded
        for this weight. Raises `NumericalError` for NaN or Inf, and `PatternError` where the pattern cannot cover the weight.
        """
        ...


def workspace_of(pruner: Pruner, out: int, width: int) -> int:
    """`pruner.workspace(out, width)`, or for a method that has none six fp32 copies of the weight, and three matrices of
    (in, in) where it needs a Gram."""
    if callable(getattr(pruner, "workspace", None)):
        return pruner.workspace(out, width)
    needs = pruner.needs
    factors = USUAL_FACTORS * 4 * width * width if needs is not None and issubclass(needs, Gram) else 0
    return USUAL_COPIES * 4 * out * width + factors
