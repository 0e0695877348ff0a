"""Activations left out of a product: which inputs of a matrix count for a token.

    TEAL (arXiv 2408.14690)      s_i = |x_i|
    WINA (arXiv 2505.19427)      s_i = |x_i| · ‖W_:,i‖₂

An input counts where its score is above a threshold, or among the so many largest of the token. The others count as 0; with
a centre (arXiv 2412.07174) as that, whose product with the weight is a bias: x_i − c_i is scored in the place of x_i.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Score = Literal["wina", "teal"]


@dataclass(frozen=True)
class Cut:
    """The rule of one matrix. Either `threshold` or `keep`. `norms` and `centre`: (in,) fp32 on the device of x."""

    threshold: float | None = None  # inputs count whose score is above it
    keep: int | None = None  # of a token so many count, and all that equal the last of them
    norms: Tensor | None = None  # by which scores are weighed: of the columns of the weight
    centre: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) → what is multiplied with the weight: x − centre where it counts, else 0, in the dtype of x."""
        moved = self.moved(x)
        return torch.where(self.counts(moved), moved, torch.zeros((), dtype=x.dtype, device=x.device))

    def moved(self, x: Tensor) -> Tensor:
        """x − centre, rounded to the dtype of x."""
        return x if self.centre is None else (x.float() - self.centre).to(x.dtype)

    def counts(self, moved: Tensor) -> Tensor:
        """Which of x − centre (..., in) count. NaN does: it must not be lost."""
        found = scores(moved, self.norms)
        if self.keep is not None:
            return ~(found < kth_largest(found, self.keep))
        assert self.threshold is not None
        return ~(found <= self.threshold)

    def described(self) -> dict[str, Any]:
        """The numbers of the rule, for config.json."""
        return {"threshold": self.threshold} if self.keep is None else {"keep": self.keep}


def column_norms(weight: Tensor) -> Tensor:
    """‖W_:,i‖₂ of a weight (out, in): (in,) fp32."""
    return weight.float().square().sum(dim=0).sqrt()


def scores(x: Tensor, norms: Tensor | None) -> Tensor:
    """s (..., in) fp32."""
    size = x.float().abs()
    return size if norms is None else size * norms


def kth_largest(found: Tensor, count: int) -> Tensor:
    """Of each row of scores (..., in) the `count`-th largest, (..., 1); infinite where none is to count."""
    if count == 0:
        return found.new_full((*found.shape[:-1], 1), torch.inf)
    return found.kthvalue(found.shape[-1] - count + 1, dim=-1, keepdim=True).values


def threshold_at(found: Tensor, share: float) -> float:
    """The threshold that `share` of the scores do not exceed: the round(share · count)-th smallest."""
    count = round(share * found.numel())
    return -1.0 if count == 0 else found.flatten().kthvalue(count).values.item()
