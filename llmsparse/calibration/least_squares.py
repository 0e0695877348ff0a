"""A weight fitted in closed form to the output that it should give: argmin Σ ‖y − W̃h‖² + λ‖W̃ − W‖².

The normal equations are summed up over tokens, so that calibration can be as long as it likes. How strongly W̃ is held
to W is decided on tokens held back: where text is short and inputs are many, fitting closely is worse than not fitting
at all.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DAMPS = (
    0.001,
    0.01,
    0.1,
    1.0,
)  # λ as a fraction of the mean of the diagonal, tried until one is worse than the one before
HELD_BACK = 8  # of so many tokens one judges them …
JUDGES = 2**14  # … up to this number


class Fit(NamedTuple):
    """What came of fitting a weight."""

    weight: Tensor  # (out, in); the one it started from where no fit is better
    damp: float | None  # the damping that was best on the tokens held back; None where no fit was better
    solved: bool  # some damping made the equations solvable


def fit(gram: Tensor, targets: Tensor, start: Tensor, judges: Sequence[tuple[Tensor, Tensor]], share: int = 1) -> Fit:
    """`start` (out, in) fitted to HᵀH (in, in) and HᵀY (in, out), where that is better on `judges`.

    Each judge is h (tokens, in) and y (tokens, out) of tokens that are not in the sums. One in `share` of the outputs
    decides how strong the damping is: a fraction of the work where outputs are many.
    """
    some, judges = start[::share], [(h, y[:, ::share]) for h, y in judges]
    best, least = Fit(some, None, False), error(some, judges)
    for damp in DAMPS:
        weight = solve(gram, targets[:, ::share], some, damp)
        if weight is None:
            continue
        best = best._replace(solved=True)
        found = error(weight, judges)
        if found < least:
            best, least = Fit(weight, damp, True), found
        elif best.damp is not None:
            break
    if share == 1:
        return best
    whole = start if best.damp is None else solve(gram, targets, start, best.damp)
    assert whole is not None
    return best._replace(weight=whole)


def solve(gram: Tensor, targets: Tensor, start: Tensor, damp: float) -> Tensor | None:
    """argmin ‖Y − H W̃ᵀ‖² + λ‖W̃ − W‖² for gram HᵀH, targets HᵀY and `start` W (out, in); None if singular.

    λ is `damp` times the mean of the diagonal of the gram matrix.
    """
    damping = damp * gram.diagonal().mean()
    regular = gram.clone()
    regular.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(regular)
    if failed or not torch.isfinite(factor.diagonal()).all():
        return None
    return torch.cholesky_solve(targets + damping * start.T, factor).T.contiguous()


def fit_factors(products: Tensor, targets: Tensor, damp: float) -> Tensor:
    """argmin_s Σ ‖y − Σ_i s_i p_i‖² + λ ‖s − 1‖² for sums of ⟨p_i, p_j⟩ (n, n) and ⟨p_i, y⟩ (n,); (n,) as they are.

    λ is `damp` times the mean of the diagonal, and pulls towards 1.
    """
    damping = damp * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype, device=products.device)
    if not damping.any():
        return torch.ones_like(targets)
    return torch.linalg.solve(products + damping, targets + damping.diagonal())


def error(weight: Tensor, judges: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Σ ‖y − W̃h‖² over the tokens of `judges`, (h, y) each."""
    return sum((target - hidden @ weight.T).square().sum().item() for hidden, target in judges)
