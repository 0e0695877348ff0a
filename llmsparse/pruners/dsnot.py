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
from typing import Literal

import torch
from torch import Tensor

from llmsparse.patterns import Pattern, Scope
from llmsparse.pruners.protocol import Pruned, Pruner
from llmsparse.pruners.wanda import Wanda
from llmsparse.stats import InputMoments, Statistic, combine

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
        swap = self._swap if self.criterion == "expected" else self._swap_as_published
        keep, swaps = swap(weight, start, stat, pattern.span)
        regrown = keep & ~start.keep
        return Pruned.of(torch.where(regrown, weight, start.weight), keep, **start.notes, swaps=swaps)

    def _swap(self, weight: Tensor, start: Pruned, stat: InputMoments, span: int) -> tuple[Tensor, int]:
        """The mask after the swaps that lower E most, and their number."""
        keep = start.keep.clone()
        gap = weight - start.weight
        error = (gap @ stat.mean).double()  # ε (out,)
        total = error.square() + (gap.square() @ stat.variance).double()  # E (out,)
        index, valid = _edge_of_mask(torch.where(keep, start.weight, weight).abs() * stat.norm, keep, span)
        old, new = weight.gather(1, index).double(), start.weight.gather(1, index).double()
        mean, variance, kept = stat.mean.double()[index], stat.variance.double()[index], keep.gather(1, index)
        shift = torch.where(kept, new, old) * mean  # what pruning it adds to ε, and regrowing it takes away
        cost = (old.square() - (old - new).square().where(kept, 0.0)) * variance  # the same for the rest of E
        row, swaps = torch.arange(len(keep), device=keep.device), 0
        best = _best_in_row if span == 1 else _best_in_group
        for _ in range(self.max_cycles):
            p, u, change = best(error, shift, cost, kept & valid, ~kept & valid, span)
            better = change < -1e-9 * total  # not 0: rounding errors must not go round in circles
            if not bool(better.any()):
                break
            row, index, valid, old, mean, variance = (t[better] for t in (row, index, valid, old, mean, variance))
            kept, shift, cost, p, u = (t[better] for t in (kept, shift, cost, p, u))
            at = torch.arange(len(row), device=row.device)
            error = error[better] + shift[at, p] - shift[at, u]
            total = total[better] + change[better]
            shift[at, p], cost[at, p] = old[at, p] * mean[at, p], old[at, p].square() * variance[at, p]
            kept[at, p], kept[at, u] = False, True
            keep[row, index[at, p]], keep[row, index[at, u]] = False, True
            swaps += len(row)
        return keep, swaps

    def _swap_as_published(self, weight: Tensor, start: Pruned, stat: InputMoments, span: int) -> tuple[Tensor, int]:
        """The mask after the swaps that bring ε towards zero, and their number."""
        keep = start.keep.clone()
        gap = weight - start.weight
        error = gap @ stat.mean  # ε (out,)
        limit = self.update_threshold * (gap.square() @ stat.variance).sqrt()
        shift = torch.where(keep, start.weight, weight) * stat.mean  # W_ij μ_j
        key = shift / stat.variance.clamp_min(torch.finfo(torch.float32).tiny) ** self.variance_power
        score = (start.weight.abs() * stat.norm).masked_fill(~keep, torch.inf)  # inf: not to be pruned (again)
        cycles, grow, drop = min(self.max_cycles, keep.shape[1]), [], []
        for sign in (-1, 1):  # of ε: regrow what has its sign, by W μ / σ² (eq. 4), prune what has the other, by Wanda's score
            grow.append((sign * key).masked_fill(keep | (sign * shift <= 0), -torch.inf).topk(cycles, dim=1))
            drop.append(score.masked_fill(sign * shift >= 0, torch.inf).topk(cycles, dim=1, largest=False))
        row, active, swaps = torch.arange(len(keep), device=keep.device), error != 0, 0
        taken = torch.zeros(2, len(keep), dtype=torch.long, device=keep.device)  # from the lists of either sign
        for _ in range(cycles):
            side = error > 0
            at = (row, taken[side.long(), row])
            u = torch.where(side, grow[1].indices[at], grow[0].indices[at])
            found = torch.where(side, grow[1].values[at], grow[0].values[at]) > -torch.inf
            if span == 1:
                p = torch.where(side, drop[1].indices[at], drop[0].indices[at])
                found &= torch.where(side, drop[1].values[at], drop[0].values[at]) < torch.inf
            else:
                group = (u // span * span)[:, None] + torch.arange(span, device=u.device)
                lowest, member = score.gather(1, group).min(dim=1)
                p, found = group[row, member], found & (lowest < torch.inf)
            after = error + shift[row, p] - shift[row, u]
            active = active & found & (error.abs() > limit) & (after.abs() < error.abs())
            if not bool(active.any()):
                break
            r, p, u = row[active], p[active], u[active]
            keep[r, p], keep[r, u], score[r, p] = False, True, torch.inf
            error = torch.where(active, after, error)
            taken[side[active].long(), r] += 1
            swaps += len(r)
        return keep, swaps


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
    margin = kept.unflatten(1, (-1, span)).amin(dim=2) - pruned.unflatten(1, (-1, span)).amax(dim=2)
    few = min(max(2 * CANDIDATES // span, 1), margin.shape[1])
    group = margin.topk(few, dim=1, largest=False).indices
    index = (group[:, :, None] * span + torch.arange(span, device=score.device)).flatten(1)
    return index, torch.ones_like(index, dtype=torch.bool)


def _best_in_row(
    error: Tensor, shift: Tensor, cost: Tensor, prunable: Tensor, growable: Tensor, span: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which to prune, which to regrow, and the change of E, (rows,) each; either for the best of the other, in turn."""
    e = error[:, None]
    p_shift = torch.zeros_like(e)
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
    e = error[:, None, None, None]
    groups = [t.unflatten(1, (-1, span)) for t in (shift, cost, prunable, growable)]
    s, c, prune, grow = groups
    delta = s[..., :, None] - s[..., None, :]  # (rows, groups, p, u)
    change = (e + delta).square() - e.square() + c[..., :, None] - c[..., None, :]
    change = change.masked_fill(~(prune[..., :, None] & grow[..., None, :]), torch.inf).flatten(1)
    change, pair = change.min(dim=1)
    group = pair // (span * span) * span
    return group + pair // span % span, group + pair % span, change
