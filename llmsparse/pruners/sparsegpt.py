"""SparseGPT (Frantar & Alistarh, ICML 2023, arXiv:2301.00774): prune column by column, let the rest absorb the error.

Minimises ‖X Ŵᵀ - X Wᵀ‖² greedily. Columns are decided left to right in blocks; what pruning a column costs is compensated
by the columns to its right, through the inverse Hessian of those that remain.

Differs from the released code: exact counts, cumulative over blocks (that prunes one too many in each); an input that
was never active costs nothing to prune but adds no zeros beyond the count (that zeroes its whole column); damping that
proves too small is raised tenfold and reported, never replaced by the identity; blocks are whole N:M groups, whatever the
width; the inverse's Cholesky factor comes from one factorization, where that takes two and an inversion.
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

MAX_ESCALATIONS = 4


@dataclass(frozen=True)
class SparseGPT:
    """`block`: columns decided together; `damp`: share of the Hessian's mean diagonal added to it."""

    block: int = 128
    damp: float = 0.01

    scope: ClassVar[Scope] = "matrix"

    @property
    def needs(self) -> type[Statistic] | None:
        return Gram

    def __call__(
        self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator
    ) -> Pruned:
        assert isinstance(stat, Gram)
        pattern.check("weight", (weight.shape[0], weight.shape[1]))
        u, damp = stat.factor(("sparsegpt", self.damp), lambda: inverse_factor(stat, self.damp))
        dead = stat.norm == 0
        w = weight.T.contiguous()  # (in, out): a column of W is contiguous
        w[dead] = 0.0  # costs nothing to prune: goes first
        width, keep = w.shape[0], torch.empty_like(w, dtype=torch.bool)
        step = max(self.block // pattern.span, 1) * pattern.span
        for a in range(0, width, step):
            b = min(a + step, width)
            errors = _prune_block(w[a:b], u[a:b, a:b], keep[a:b], pattern, a, width)
            w[b:] -= u[a:b, b:].T @ errors
        w[dead] = weight.T[dead]
        notes = {"damp": damp} if damp != self.damp else {}
        return Pruned.of(w.T.contiguous(), keep.T.contiguous(), **notes)


def _prune_block(w: Tensor, u: Tensor, keep: Tensor, pattern: Pattern, first: int, width: int) -> Tensor:
    """Prune `w` (block, out) in place, fill `keep`; returns what each column passes on, (block, out)."""
    span = len(w) if pattern.span == 1 else pattern.span
    errors = torch.zeros_like(w)
    for j in range(len(w)):
        if j % span == 0:
            score = (w[j : j + span] / u.diagonal()[j : j + span, None]).square()  # w² / [(H_j:)⁻¹]_jj   (eq. 3)
            columns = slice(first + j, first + j + span)
            keep[j : j + span] = pattern.keep(score.T, columns, width).T
        errors[j] = (w[j] / u[j, j]).masked_fill_(keep[j], 0.0)  # what zeroing column j costs …
        w[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)  # … is absorbed by the columns to its right   (eq. 4)
    return errors


def inverse_factor(stat: Gram, damp: float) -> tuple[Tensor, float]:
    """Upper triangular U with UᵀU = (H + damping)⁻¹, (in, in) fp32, and the damping it took.

    Raises `NumericalError` where not even damping 10⁴ times as strong makes H positive definite.
    """
    stat.norm  # refuses NaN and Inf
    diagonal = stat.xtx.diagonal()
    for attempt in range(MAX_ESCALATIONS + 1):
        share = damp * 10**attempt
        h = stat.xtx.clone()
        h.diagonal().add_(share * diagonal.mean())
        h.diagonal()[diagonal == 0] = 1.0
        # with rows and columns reversed, H = R Rᵀ with R upper triangular, hence H⁻¹ = R⁻ᵀ R⁻¹ and U = R⁻¹
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if int(info) == 0:
            eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True), share
    raise NumericalError(
        f"Hessian of {len(diagonal)} inputs is not positive definite after {stat.tokens} tokens, even with damping {share:g} "
        "of its mean diagonal; calibrate with more tokens, or use wanda"
    )
