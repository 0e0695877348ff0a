"""DSnoT, Dynamic Sparse no Training (Zhang et al., ICLR 2024, arXiv:2310.08915): swap pruned and kept weights of a row.

Starts from another method's mask and lowers the expected output error, known from the mean and variance of the inputs
alone. With ε_i = Σ_{j pruned} W_ij μ_j, the mean error of output i, each cycle regrows one weight and prunes another, in
the same row, or the same group for N:M, so that counts stay as they are.

`criterion="expected"`, the default, is not the paper's: its rule looks at ε alone, may raise the squared error, and as
released ruins narrow layers. Here a row takes the swap that most lowers E_i = ε_i² + Σ_{j pruned} W_ij² σ_j², the expected
squared error for uncorrelated inputs, and stops where none does: by this measure no row ends worse than it began.

`criterion="paper"` is the published rule, but a swap that would raise |ε| ends the row, and the threshold, there on a sum over
the tokens of one sequence, is in standard deviations of the row's error. Not repeated of the released code: it skips
every MLP, breaks N:M and the count (it regrows weights that were never pruned), takes inputs that never vary for the
best, and after SparseGPT prunes the first columns.

After a method that updates weights, kept weights are the updated ones and regrown weights the original ones; the error is
then that of the whole row, W_ij - Ŵ_ij for a weight that is kept.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llmsparse.errors import RecipeError
from llmsparse.pruners.protocol import Pruned, Pruner, workspace_of
from llmsparse.pruners.wanda import Wanda
from llmsparse.sparsity.patterns import Pattern, Scope
from llmsparse.sparsity.stats import InputMoments, Statistic, combine

CANDIDATES = 128  # weights on either side of the mask's edge that a row's swaps are chosen from
ROUNDS = 3  # of choosing one side of a swap for the best of the other


@dataclass(frozen=True)
class DSnoT:
    """At most `max_cycles` swaps a row; `update_threshold` and `variance_power` belong to `criterion="paper"`."""

    initial: Pruner = field(default_factory=Wanda)
    max_cycles: int = 50
    update_threshold: float = 0.1
    variance_power: float = 1.0
    criterion: Literal["expected", "paper"] = "expected"

    def __post_init__(self) -> None:
        if self.max_cycles < 0 or self.criterion not in ("expected", "paper"):
            raise RecipeError(
                f"max_cycles {self.max_cycles}, criterion '{self.criterion}': give 0 or more cycles, and expected or paper"
            )

    @property
    def scope(self) -> Scope:
        return self.initial.scope

    @property
    def needs(self) -> type[Statistic] | None:
        return combine(self.initial.needs, InputMoments)

    def workspace(self, out: int, width: int) -> int:
        """What the initial method takes or, if more, swapping: seven fp32 matrices of the weight's shape and masks (eleven,
        as published), or three and what is known of each row's candidates in fp64, with trials: 150 bytes a candidate."""
        choosing = (34 if self.criterion == "expected" else 48) * out * width
        candidates = 2 * min(CANDIDATES, width) if self.criterion == "expected" else 0
        swapping = max(choosing, out * (14 * width + 150 * candidates))
        return max(workspace_of(self.initial, out, width), swapping)

    def __call__(self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator) -> Pruned:
        assert isinstance(stat, InputMoments)
        start = self.initial(weight, stat, pattern, generator)
        value, keep = torch.where(start.keep, start.weight, weight), start.keep.clone()
        swap = self._swap if self.criterion == "expected" else self._swap_as_published
        swaps = swap(weight, value, keep, stat, pattern.span)
        return Pruned.of(value, keep, **start.notes, swaps=swaps)

    def _swap(self, weight: Tensor, value: Tensor, keep: Tensor, stat: InputMoments, span: int) -> int:
        """Make the swaps that lower E most, in `keep` and `value` (what is, or would be, kept); returns their number."""
        gap = weight - value.masked_fill(~keep, 0.0)
        error = (gap @ stat.mean).double()  # ε (out,)
        total = error.square() + (gap.square() @ stat.variance).double()  # E (out,)
        index, valid = _edge_of_mask(value.abs() * stat.norm, keep, span)  # (out, candidates)
        dense, now, kept = weight.gather(1, index).double(), value.gather(1, index).double(), keep.gather(1, index)
        mean, variance = stat.mean.double()[index], stat.variance.double()[index]
        shift = now * mean  # what pruning it adds to ε, and regrowing it takes away
        cost = (dense.square() - (dense - now).square()) * variance  # the same for the rest of E
        row, swaps = torch.arange(len(keep), device=keep.device), 0
        best = _best_in_row if span == 1 else _best_in_group
        for _ in range(self.max_cycles):
            p, u, change = best(error, shift, cost, kept & valid, ~kept & valid & (dense != 0), span)
            better = change < -1e-9 * total  # not 0: rounding errors must not go round in circles
            if not bool(better.any()):
                break
            row, index, valid, dense, mean, variance = (t[better] for t in (row, index, valid, dense, mean, variance))
            kept, shift, cost, p, u = (t[better] for t in (kept, shift, cost, p, u))
            at = torch.arange(len(row), device=row.device)
            error = error[better] + shift[at, p] - shift[at, u]
            total = total[better] + change[better]
            shift[at, p], cost[at, p] = (dense * mean)[at, p], (dense.square() * variance)[at, p]
            kept[at, p], kept[at, u] = False, True
            p, u = index[at, p], index[at, u]
            keep[row, p], keep[row, u], value[row, p] = False, True, weight[row, p]
            swaps += len(row)
        return swaps

    def _swap_as_published(self, weight: Tensor, value: Tensor, keep: Tensor, stat: InputMoments, span: int) -> int:
        """Make the swaps that bring ε towards zero, in `keep`; returns their number."""
        gap = weight - value.masked_fill(~keep, 0.0)
        error = gap @ stat.mean  # ε (out,)
        limit = self.update_threshold * (gap.square() @ stat.variance).sqrt()
        shift = value * stat.mean  # W_ij μ_j
        key = shift / stat.variance.clamp_min(torch.finfo(torch.float32).tiny) ** self.variance_power
        score = (value.abs() * stat.norm).masked_fill(~keep, torch.inf)  # inf: not to be pruned, or not again
        cycles = min(self.max_cycles, keep.shape[1])
        # candidates (2, out, cycles), best first, for ε < 0 and ε > 0: regrow what has the sign of ε, by W μ / σ² (eq. 4);
        # prune what has the other, by Wanda's score (eq. 5)
        sign = torch.tensor([-1.0, 1.0], device=keep.device)[:, None, None]
        grow = (sign * key).masked_fill(keep | (sign * shift <= 0), -torch.inf).topk(cycles, dim=2)
        drop = score.expand(2, -1, -1).masked_fill(sign * shift >= 0, torch.inf).topk(cycles, dim=2, largest=False)
        row, active, swaps = torch.arange(len(keep), device=keep.device), error != 0, 0
        taken = torch.zeros(2, len(keep), dtype=torch.long, device=keep.device)  # of either
        for _ in range(cycles):
            side = (error > 0).long()
            at = (side, row, taken[side, row])
            u, found = grow.indices[at], grow.values[at] > -torch.inf
            if span == 1:
                p, found = drop.indices[at], found & (drop.values[at] < torch.inf)
            else:
                group = (u // span * span)[:, None] + torch.arange(span, device=u.device)
                lowest, member = score.gather(1, group).min(dim=1)
                p, found = group[row, member], found & (lowest < torch.inf)
            after = error + shift[row, p] - shift[row, u]
            active = active & found & (error.abs() > limit) & (after.abs() < error.abs())
            if not bool(active.any()):
                break
            rows, p, u = row[active], p[active], u[active]
            keep[rows, p], keep[rows, u], score[rows, p] = False, True, torch.inf
            error = torch.where(active, after, error)
            taken[side[active], rows] += 1
            swaps += len(rows)
        return swaps


def _edge_of_mask(score: Tensor, keep: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Columns (out, candidates) of the kept weights that are worth least and of the pruned ones that are worth most.

    For N:M whole groups, those whose cheapest kept weight is worth least beside their dearest pruned one. The second
    result is False for what fills up a row that has too few.
    """
    kept, pruned = score.masked_fill(~keep, torch.inf), score.masked_fill(keep, -torch.inf)
    if span == 1:
        few = min(CANDIDATES, score.shape[1])
        cheap, dear = kept.topk(few, dim=1, largest=False), pruned.topk(few, dim=1)
        valid = torch.cat([cheap.values != torch.inf, dear.values != -torch.inf], dim=1)
        return torch.cat([cheap.indices, dear.indices], dim=1), valid
    margin = kept.view(len(score), -1, span).amin(dim=2) - pruned.view(len(score), -1, span).amax(dim=2)
    few = min(max(2 * CANDIDATES // span, 1), margin.shape[1])
    group = margin.topk(few, dim=1, largest=False).indices
    index = (group[:, :, None] * span + torch.arange(span, device=score.device)).flatten(1)
    return index, torch.ones_like(index, dtype=torch.bool)


def _best_in_row(
    error: Tensor, shift: Tensor, cost: Tensor, prunable: Tensor, growable: Tensor, span: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which to prune, which to regrow, and the change of E, (rows,) each; either for the best of the other, in turn."""
    e = error[:, None]
    p, p_shift = torch.zeros_like(e, dtype=torch.long), torch.zeros_like(e)
    u, u_shift = p, p_shift
    for _ in range(ROUNDS):
        u = ((e + p_shift - shift).square() - cost).masked_fill(~growable, torch.inf).argmin(dim=1, keepdim=True)
        u_shift = shift.gather(1, u)
        p = ((e - u_shift + shift).square() + cost).masked_fill(~prunable, torch.inf).argmin(dim=1, keepdim=True)
        p_shift = shift.gather(1, p)
    change = (e + p_shift - u_shift).square() - e.square() + cost.gather(1, p) - cost.gather(1, u)
    possible = prunable.gather(1, p) & growable.gather(1, u)
    return p[:, 0], u[:, 0], change.masked_fill(~possible, torch.inf)[:, 0]


def _best_in_group(
    error: Tensor, shift: Tensor, cost: Tensor, prunable: Tensor, growable: Tensor, span: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for whole groups of `span` candidates, by trying every pair of every group."""
    e = error[:, None]
    prune = (2 * e * shift + shift.square() + cost).masked_fill(~prunable, torch.inf).view(len(error), -1, span)
    grow = (-2 * e * shift + shift.square() - cost).masked_fill(~growable, torch.inf).view(len(error), -1, span)
    s = shift.view(len(error), -1, span)
    change = prune[:, :, :, None] + grow[:, :, None, :]  # (rows, groups, p, u)
    best = change.addcmul_(s[:, :, :, None], s[:, :, None, :], value=-2).flatten(1).min(dim=1)
    group, pair = best.indices // span**2 * span, best.indices % span**2
    return group + pair // span, group + pair % span, best.values
