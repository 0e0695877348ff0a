"""SparseSwaps (arXiv 2512.10922): swaps in a row that lower its exact output error, after another method.

With E = W − Ŵ the error of a row is L = E H Eᵀ, H = XᵀX. Letting weight i return to its dense value and weight j go changes it
by

    ΔL = E_i² H_ii − 2 E_i (EH)_i  +  Ŵ_j² H_jj + 2 Ŵ_j (EH)_j  −  2 E_i Ŵ_j H_ij

A row takes the best swap there is among the likeliest of either side, as long as one lowers L, so the pattern stays and no
row ends worse than it began. The weights on the support that comes of it are then solved for, as ALPS does.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmsparse.errors import RecipeError
from llmsparse.pruners.protocol import Pruned, Pruner, workspace_of
from llmsparse.pruners.sparsegpt import SparseGPT
from llmsparse.pruners.support import solve_on_support
from llmsparse.sparsity.patterns import Pattern, Scope
from llmsparse.sparsity.stats import Gram, Statistic

CANDIDATES = 32  # on either side, of which every pair is looked at
LEAST = 1e-6  # of a row's error, that a swap has to take away


@dataclass(frozen=True)
class Swaps:
    """At most `swaps` a row after the method `initial`; `damp`: share of the Hessian's mean diagonal added to it;
    `solve_iterations` of conjugate gradients at the end, 0 to leave the weights."""

    initial: Pruner = field(default_factory=SparseGPT)
    swaps: int = 100
    damp: float = 0.01
    solve_iterations: int = 50

    def __post_init__(self) -> None:
        if self.swaps < 0 or self.damp <= 0 or self.solve_iterations < 0:
            raise RecipeError(
                f"swaps {self.swaps}, damp {self.damp:g}, solve_iterations {self.solve_iterations}: give damp above 0, and "
                "at least 0 of the others"
            )

    @property
    def scope(self) -> Scope:
        return self.initial.scope

    @property
    def needs(self) -> type[Statistic] | None:
        return Gram

    def workspace(self, out: int, width: int) -> int:
        """What the initial method takes or, if more, the damped Hessian beside ten fp32 matrices of the weight's shape and
        what is known of every pair of candidates."""
        pairs = min(CANDIDATES, width) ** 2
        return max(workspace_of(self.initial, out, width), 4 * width * width + out * (46 * width + 24 * pairs))

    def __call__(self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator) -> Pruned:
        assert isinstance(stat, Gram)
        start = self.initial(weight, stat, pattern, generator)
        h = stat.factor(("swaps", self.damp), lambda: _damped(stat.xtx, self.damp))
        value, keep = start.weight.clone(), start.keep.clone()
        taken = _swap(weight, value, keep, h, pattern.span, self.swaps)
        if self.solve_iterations:
            value, _ = solve_on_support(weight @ h, h, value, keep, self.solve_iterations)
        return Pruned.of(value, keep, **start.notes, swaps=taken)


def _damped(xtx: Tensor, damp: float) -> Tensor:
    h = xtx.clone()
    h.diagonal().add_(damp * xtx.diagonal().mean())
    return h


def _swap(weight: Tensor, value: Tensor, keep: Tensor, h: Tensor, span: int, most: int) -> int:
    """Swaps in place of `value` (out, in), which is 0 off `keep`; returns how many."""
    error = weight - value
    slope = error @ h  # (out, in): half the gradient of the rows' errors
    left = (error * slope).sum(dim=1)  # (out,): the rows' errors
    rows, diagonal, taken = torch.arange(len(weight), device=weight.device), h.diagonal(), 0
    for _ in range(most):
        grown = (error.square() * diagonal - 2 * error * slope).masked_fill_(keep, torch.inf)
        gone = (value.square() * diagonal + 2 * value * slope).masked_fill_(~keep, torch.inf)
        change, i, j = _best(grown, gone, error, value, h, span)  # (out,) each
        better = change < -LEAST * left
        if not bool(better.any()):
            break
        at, i, j = rows[better], i[better], j[better]
        back, away = error[at, i], value[at, j]
        slope[at] += away[:, None] * h[j] - back[:, None] * h[i]
        value[at, i], value[at, j] = weight[at, i], 0.0
        error[at, i], error[at, j] = 0.0, weight[at, j]
        keep[at, i], keep[at, j] = True, False
        left = left + torch.where(better, change, 0.0)
        taken += len(at)
    return taken


def _best(
    grown: Tensor, gone: Tensor, error: Tensor, value: Tensor, h: Tensor, span: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row the change of its error by its best swap, and the columns that return and go.

    For N:M (`span` > 1) they are of one group, and every pair of the groups whose pairs promise most is looked at.
    """
    if span == 1:
        count = min(CANDIDATES, grown.shape[1])
        i = grown.topk(count, largest=False).indices[:, :, None]  # (out, candidates, 1)
        j = gone.topk(count, largest=False).indices[:, None, :]
    else:
        count = min(CANDIDATES, grown.shape[1] // span)
        promised = (_grouped(grown, span) + _grouped(gone, span)).topk(count, largest=False).indices  # (out, groups)
        columns = promised[:, :, None] * span + torch.arange(span, device=grown.device)  # (out, groups, span)
        i = columns[:, :, :, None].expand(-1, -1, -1, span).flatten(1)  # (out, pairs)
        j = columns[:, :, None, :].expand(-1, -1, span, -1).flatten(1)
    rows = torch.arange(len(grown), device=grown.device).view(-1, *[1] * (i.dim() - 1))
    change = grown[rows, i] + gone[rows, j] - 2 * error[rows, i] * value[rows, j] * h[i, j]
    change = change.nan_to_num(nan=torch.inf).flatten(1)  # inf where a column is on the other side
    best = change.argmin(dim=1, keepdim=True)
    i, j = (side.reshape(len(grown), -1) for side in torch.broadcast_tensors(i, j))
    return change.gather(1, best)[:, 0], i.gather(1, best)[:, 0], j.gather(1, best)[:, 0]


def _grouped(score: Tensor, span: int) -> Tensor:
    """The least of each group, (out, groups)."""
    return score.view(len(score), -1, span).amin(dim=2)
