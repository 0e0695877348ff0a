"""SparseGPT (Frantar & Alistarh, ICML 2023, arXiv:2301.00774): prune column by column, let the rest absorb the error.

Minimises ‖X Ŵᵀ - X Wᵀ‖² greedily. Columns are decided left to right in blocks; what pruning a column costs is compensated
by the columns to its right, as the Hessian H = XᵀX of those that remain tells.

The paper writes the update with U, the upper Cholesky factor of H⁻¹: an error e_j = w_j / U_jj of column j changes the
columns to its right by -e_j U_j:. With H = Mᵀ D² M, M unit lower triangular, U = (D M)⁻ᵀ, and all that ever reaches column j
adds up to Σ_{i<j} M_ji z_i, where z_i = w_i - ŵ_i is what column i has lost: the same numbers without the inverse, which is
most of the cost of a wide weight. The score w_j² / U_jj² is (w_j D_j)².

Differs from the released code, besides: exact counts, cumulative over blocks (that prunes one too many in each); an input
that was never active is cheapest to prune but adds no zeros beyond the count (that zeroes its column); damping that
proves too small is raised tenfold and reported; blocks are whole N:M groups, whatever the width.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from llmsparse.errors import NumericalError, RecipeError
from llmsparse.pruners.protocol import Pruned
from llmsparse.sparsity.patterns import NofM, Pattern, Scope, refuse_nan
from llmsparse.sparsity.stats import Gram, Statistic

ESCALATIONS = 4  # of the damping, tenfold each
LAUNCHED = 128  # columns that a GPU solves in one launch: three for each of them is what most of the time would go to


@dataclass(frozen=True)
class SparseGPT:
    """`block`: columns whose mask is decided together, unless N:M; `damp`: share of the Hessian's mean diagonal added to it."""

    block: int = 128
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.block < 1 or self.damp <= 0:
            raise RecipeError(
                f"block {self.block}, damp {self.damp:g}: give a block of at least 1 column and damp above 0"
            )

    @property
    def scope(self) -> Scope:
        return "matrix"

    @property
    def needs(self) -> type[Statistic] | None:
        return Gram

    def workspace(self, out: int, width: int) -> int:
        """H, its Cholesky factor and M while they are made; then M alone beside W, z, their difference, the result with a
        copy in its layout, and masks: 24 bytes a weight."""
        square = 4 * width * width
        return max(3 * square, square + 24 * out * width)

    def __call__(self, weight: Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator) -> Pruned:
        assert isinstance(stat, Gram)
        refuse_nan(weight)  # once; the solve keeps what is finite finite, and `Pruned.of` looks at what came out
        dead = stat.norm == 0
        m, scale, damp = stat.factor(("sparsegpt", self.damp), lambda: factor_hessian(stat, self.damp))
        w = weight.T.clone(memory_format=torch.contiguous_format)  # (in, out): a column of W is a row here
        w[dead] = 0.0  # free to prune: goes first
        width, span = w.shape[0], pattern.span
        lost, keep = torch.zeros_like(w), torch.empty_like(w, dtype=torch.bool)  # z, mask
        step = max(self.block // span, 1) * span
        together = step if span == 1 else span  # columns whose mask is decided together
        for a in range(0, width, step):
            b = min(a + step, width)
            now = torch.addmm(w[a:b], m[a:b, :a], lost[:a])  # what finished blocks make of this one
            if self._launches(w.device, b - a, pattern):
                keep[a:b], lost[a:b] = self._in_one_launch(now, w[a:b], m[a:b, a:b], scale[a:b], pattern, a, width)
                continue
            for c in range(a, b, together):
                d = min(c + together, b)
                group = now[c - a : d - a].addmm_(m[c:d, a:c], lost[a:c])  # and finished groups
                below = group - w[c:d]
                change = cast(
                    Tensor, torch.linalg.solve_triangular(m[c:d, c:d], below, upper=False, unitriangular=True)
                )
                score = ((w[c:d] + change) * scale[c:d, None]).square()  # w² / U_jj²   (eq. 3)
                keep[c:d] = pattern.keep(score.T, slice(c, d), width, checked=True).T
                kept = keep[c:d].float()
                for j in range(c, d):
                    group[j - c].addmv_(lost[c:j].T, m[j, c:j])  # and the columns just before   (eq. 4)
                    torch.addcmul(w[j], group[j - c], kept[j - c], value=-1, out=lost[j])
        notes = {"damp": damp} if damp != self.damp else {}
        return Pruned.of(torch.where(dead, weight, (w - lost).T).contiguous(), keep.T.contiguous(), **notes)

    @staticmethod
    def _launches(device: torch.device, columns: int, pattern: Pattern) -> bool:
        """Whether a block is solved in one launch: on a GPU, where the pattern needs nothing but scores."""
        return device.type == "cuda" and columns <= LAUNCHED and (pattern.span == 1 or isinstance(pattern, NofM))

    @staticmethod
    def _in_one_launch(
        now: Tensor, w: Tensor, m: Tensor, scale: Tensor, pattern: Pattern, start: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """The mask of a block and what its columns lose, (columns, out) each, as the loop over its columns finds them."""
        from triton_ops.absorb import absorb, absorb_groups

        if isinstance(pattern, NofM):
            lost, keep = absorb_groups(now, w, m, scale, pattern.n, pattern.m)
            return keep, lost
        change = cast(Tensor, torch.linalg.solve_triangular(m, now - w, upper=False, unitriangular=True))
        score = ((w + change) * scale[:, None]).square()
        keep = pattern.keep(score.T, slice(start, start + len(w)), width, checked=True).T
        return keep, absorb(now, w, m, keep)


def factor_hessian(stat: Gram, damp: float) -> tuple[Tensor, Tensor, float]:
    """M (in, in) unit lower triangular and D (in,) with H + damping = Mᵀ D² M, and the share of the mean diagonal that took.

    Raises `NumericalError` where the strongest damping does not make H positive definite.
    """
    diagonal = stat.xtx.diagonal()
    share = damp
    for attempt in range(ESCALATIONS + 1):
        share = damp * 10**attempt
        h = stat.xtx.flip(0, 1)  # the Cholesky factor of H with rows and columns reversed is D M, reversed
        h.diagonal().add_(share * diagonal.mean())
        h.diagonal()[diagonal.flip(0) == 0] = 1.0
        factor = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(h, upper=True))
        if int(factor[1]) == 0:
            lower = factor[0].flip(0, 1)
            scale = lower.diagonal().clone()
            return lower.div_(scale[:, None]), scale, share
    raise NumericalError(
        f"Hessian of {len(diagonal)} inputs is not positive definite after {stat.tokens} tokens, even with damping {share:g} of "
        "its mean diagonal; calibrate with more tokens, or use another method"
    )
