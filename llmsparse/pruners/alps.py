"""ALPS (Meng et al., NeurIPS 2024, arXiv:2406.07831): mask and weights together, by ADMM on the layer's output error.

    minimise ‖X Wᵀ - X W₀ᵀ‖² + damping ‖W - W₀‖²   subject to the pattern                           (eq. 1, 2)

is split into B, which fits, and D, which obeys the pattern; ρ pulls them together until the support stands still. Then
the weights on that support are solved for by conjugate gradients.

Differs from the released code: one Cholesky factorization per value of ρ where that takes one eigendecomposition in
fp64 on the CPU (the slower of the two at every width measured, as ρ changes about ten times); a row's conjugate gradients
stop when that row has converged; exact counts. Compares within rows by default: equal layer error, and balanced rows.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.patterns import Pattern, Scope
from llmsparse.pruners.protocol import Pruned
from llmsparse.stats import Gram, Statistic


@dataclass(frozen=True)
class ALPS:
    damp: float = 0.01
    rho: float = 0.1
    iterations: int = 300
    solve_iterations: int = 10
    dtype: torch.dtype = torch.float64

    scope: ClassVar[Scope] = "row"

    @property
    def needs(self) -> type[Statistic] | None:
        return Gram

    def __call__(
        self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator
    ) -> Pruned:
        assert isinstance(stat, Gram)
        dead = stat.norm == 0
        h, scale = self._scaled(stat)
        b0 = weight.to(self.dtype) * scale
        b0[:, dead] = 0
        columns, width = slice(0, weight.shape[1]), weight.shape[1]
        g = b0 @ h
        keep = pattern.keep(b0.abs(), columns, width)
        kept = int(keep.sum())
        d0 = b0 * keep
        d, v, b = d0, torch.zeros_like(b0), b0
        rho, grew = self.rho, False
        inv = self._inverse(h, rho)
        last = keep
        for t in range(self.iterations):
            b = (g - v + rho * d) @ inv
            z = b + v / rho
            keep = pattern.keep(z.abs(), columns, width)
            d = z * keep
            v = v + rho * (b - d)
            if (t + 1) % 3 == 0:
                changed = int((keep ^ last).sum()) / kept
                last = keep
                if changed > 0.1:
                    grew, rho = True, rho * 1.3
                elif changed > 0.005:
                    grew, rho = True, rho * 1.2
                elif changed > 0:
                    if grew:
                        rho *= 1.1
                    else:
                        rho /= 5
                        b, d, v = b0, d0, torch.zeros_like(b0)
                elif grew:
                    break
                else:
                    rho /= 5
                if t >= 30 and changed < 3e-4:
                    break
                inv = self._inverse(h, min(rho, 1e6))
        keep = pattern.keep(b.abs(), columns, width)
        b = self._solve(h, g, b * keep, keep)
        w = (b / scale).float()
        w[:, dead] = weight[:, dead]
        return Pruned.of(w, keep)

    def _scaled(self, stat):
        h = stat.xtx.to(self.dtype)
        h = h.clone()
        h.diagonal().add_(self.damp * h.diagonal().mean())
        scale = h.diagonal().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        h = h / scale / scale[:, None]
        h.diagonal().fill_(1.0)
        return h, scale

    def _inverse(self, h, rho):
        h = h.clone()
        h.diagonal().add_(rho)
        return torch.cholesky_inverse(torch.linalg.cholesky(h))

    def _solve(self, h, g, b, keep):
        r = (g - b @ h) * keep
        p = r
        rr = r.square().sum(1, keepdim=True)
        tol = 1e-12 * g.square().sum(1, keepdim=True)
        for _ in range(self.solve_iterations):
            hp = p @ h
            alpha = rr / (p * hp).sum(1, keepdim=True).clamp_min(1e-30)
            b = b + alpha * p
            r = r - alpha * hp * keep
            new = r.square().sum(1, keepdim=True)
            p = r + new / rr.clamp_min(1e-30) * p
            rr = new
        return b
