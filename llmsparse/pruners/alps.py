"""ALPS (Meng et al., NeurIPS 2024, arXiv:2406.07831): mask and weights together, by ADMM on the layer's output error.

    minimise ‖X Ŵᵀ - X Wᵀ‖² + damping ‖Ŵ - W‖²   subject to the pattern                                     (eq. 1)

is split into B, which fits, and D, which obeys the pattern; a growing ρ pulls them together until the support stands
still. The weights on that support are then solved for by conjugate gradients. Inputs are scaled to unit norm first, so
the first D is Wanda's.

Differs from the released code: exact counts; one Cholesky factorization for every value of ρ, shared by weights with one
input, where that takes an eigendecomposition in fp64 (four times the cost, and each inverse still to be put together from
it); conjugate gradients go on until every row has converged, in at most 50 steps for 10. The native scope is the row,
which leaves the layer error where it is and balances the rows.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from llmsparse.errors import NumericalError, RecipeError
from llmsparse.pruners.protocol import Pruned
from llmsparse.pruners.support import solve_on_support
from llmsparse.sparsity.patterns import Pattern, Scope
from llmsparse.sparsity.stats import Gram, Statistic

SHARED_WIDTH = 4096  # up to here inverses are kept for the next weight of this input: about a dozen of 64 MiB
INVERSES = 12  # that dozen
SOFTEST = 1e-4  # ρ at which a support that has not moved never will


@dataclass(frozen=True)
class ALPS:
    """`damp`: share of the Hessian's mean diagonal added to it; `rho`: where ρ starts; then bounds on either loop."""

    damp: float = 0.01
    rho: float = 0.1
    max_iterations: int = 300
    solve_iterations: int = 50

    def __post_init__(self) -> None:
        if self.damp <= 0 or self.rho <= 0 or self.max_iterations < 1 or self.solve_iterations < 0:
            raise RecipeError(
                f"damp {self.damp:g}, rho {self.rho:g}, max_iterations {self.max_iterations}, solve_iterations "
                f"{self.solve_iterations}: give damp and rho above 0, and at least 1 and 0 iterations"
            )

    @property
    def scope(self) -> Scope:
        return "row"

    @property
    def needs(self) -> type[Statistic] | None:
        return Gram

    def workspace(self, out: int, width: int) -> int:
        """The scaled Hessian and the inverses that are kept, with two matrices more while the last is made, beside the seven
        fp32 matrices of the weight's shape that ADMM holds; or without the two beside the eleven of conjugate gradients."""
        square, numel = 4 * width * width, out * width
        inverses = min(INVERSES, 1 + self.max_iterations // 3) if width <= SHARED_WIDTH else 0
        making = 2 * square if inverses else 4 * square  # one that is not kept stands beside the one that follows
        return (1 + inverses) * square + max(making + 30 * numel, 46 * numel)

    def __call__(self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator) -> Pruned:
        assert isinstance(stat, Gram)
        dead = stat.norm == 0
        h, scale = stat.factor(("alps", self.damp), lambda: _scaled(stat.xtx, self.damp))
        dense = (weight * scale).masked_fill_(dead, 0.0)  # dead inputs go first
        target = dense @ h
        b, iterations, settled = self._admm(dense, target, h, stat, pattern)
        keep = pattern.keep(b.abs(), slice(0, weight.shape[1]), weight.shape[1])
        b, residual = solve_on_support(target, h, b.masked_fill(~keep, 0.0), keep, self.solve_iterations)
        pruned = torch.where(dead, weight, b / scale)
        return Pruned.of(pruned, keep, iterations=iterations, settled=settled, residual=residual)

    def _admm(self, dense: Tensor, target: Tensor, h: Tensor, stat: Gram, pattern: Pattern) -> tuple[Tensor, int, bool]:
        """B (out, in) once its support has settled: its magnitudes are the score that the mask is taken from. Then after
        how many iterations, and whether it has settled by then."""
        columns, width = slice(0, dense.shape[1]), dense.shape[1]
        first = last = pattern.keep(dense.abs(), columns, width)
        b, d, v = dense, dense * first, torch.zeros_like(dense)
        kept, rho, grown = max(int(first.count_nonzero()), 1), self.rho, False
        inverse = _inverse(h, rho, stat, self.damp)
        for t in range(1, self.max_iterations + 1):
            b = torch.sub(target, v).add_(d, alpha=rho) @ inverse  # (H + ρ)⁻¹ (G - V + ρ D)
            d = torch.add(b, v, alpha=1 / rho)
            keep = pattern.keep(d.abs(), columns, width, checked=True)
            d.masked_fill_(~keep, 0.0)  # D ← P(B + V / ρ)
            v.add_(b, alpha=rho).sub_(d, alpha=rho)  # V ← V + ρ (B - D)   (eq. 4)
            if t % 3:
                continue
            moved, last = int((keep ^ last).count_nonzero()) / kept, keep
            if (moved == 0 and (grown or rho < SOFTEST)) or (moved < 3e-4 and t > 30):
                return b, t, True
            if moved > 0.005 or grown:
                rho, grown = min(rho * (1.3 if moved > 0.1 else 1.2 if moved > 0.005 else 1.1), 1e6), True
            else:  # ρ was too large to let anything move
                rho /= 5
                if moved > 0:
                    d, v = dense * first, torch.zeros_like(dense)
            inverse = _inverse(h, rho, stat, self.damp)
        return b, self.max_iterations, False


def _scaled(xtx: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Damped Hessian scaled to unit diagonal (in, in), and the scale (in,)."""
    h = xtx.clone()
    h.diagonal().add_(damp * xtx.diagonal().mean())
    scale = h.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # 0 only if no input was ever active
    h /= scale
    h /= scale[:, None]
    h.diagonal().fill_(1.0)
    return h, scale


def _inverse(h: Tensor, rho: float, stat: Gram, damp: float) -> Tensor:
    """(H + ρ)⁻¹ (in, in). Raises `NumericalError` where that is not positive definite."""

    def make() -> Tensor:
        shifted = h.clone()
        shifted.diagonal().add_(rho)
        factor = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(shifted))
        if int(factor[1]):
            raise NumericalError(
                f"Hessian of {len(h)} inputs is not positive definite after {stat.tokens} tokens, with ρ {rho:g} and "
                f"damping {damp:g}; raise damp, or calibrate with more tokens"
            )
        return torch.cholesky_inverse(factor[0], out=shifted)

    return stat.factor(("alps", damp, rho), make) if len(h) <= SHARED_WIDTH else make()
