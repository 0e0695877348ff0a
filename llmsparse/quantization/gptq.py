"""GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323): round column by column, let the columns to the right absorb the error.

Minimises ‖X Ŵᵀ - X Wᵀ‖² greedily, from left to right, in blocks of 128 columns. In the paper the rounding error of column j,
e_j = (w_j - ŵ_j) / U_jj, changes the columns to its right by -e_j U_j:, U the upper Cholesky factor of H⁻¹. As in
`pruners/sparsegpt.py` the same numbers come without the inverse: with H = Mᵀ D² M, M unit lower triangular, all that ever
reaches column j adds up to Σ_{i<j} M_ji z_i, where z_i = w_i - ŵ_i is what column i has lost.

Nothing is clipped where the code has no largest number: an outlier costs bits, and no error that others would have to carry.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128


def quantize_columns(
    weight: Tensor,
    m: Tensor,
    steps: Tensor,
    group: int,
    rounded: Callable[[Tensor], Tensor],
    keep: Tensor | None = None,
) -> Tensor:
    """Whole numbers q, int8 (out, in), with weight ≈ steps · q in what they do to the inputs.

    weight (out, in) fp32; m (in, in) as of `factor_hessian`; steps (out, ⌈in/group⌉) fp32, above 0; `rounded` makes whole
    numbers of quotients; `keep` (out, in) bool: where not, q is 0.
    """
    w = weight.T.contiguous()  # (in, out): a column of W is a row here
    lost, q = torch.zeros_like(w), torch.empty(w.shape, dtype=torch.int8, device=w.device)
    step = steps.T.contiguous()
    kept = None if keep is None else keep.T.float().contiguous()
    for a in range(0, len(w), BLOCK):
        b = min(a + BLOCK, len(w))
        now = torch.addmm(w[a:b], m[a:b, :a], lost[:a])  # what finished blocks make of this one
        for j in range(a, b):
            column = now[j - a].addmv_(lost[a:j].T, m[j, a:j])  # and the columns just before   (eq. 3)
            each = step[j // group]
            numbers = rounded(column / each)
            if kept is not None:
                numbers *= kept[j]
            q[j] = numbers
            torch.addcmul(w[j], numbers, each, value=-1, out=lost[j])
    return q.T.contiguous()


def refitted(weight: Tensor, made: Tensor, gram: Tensor, *, whole: bool = False) -> Tensor:
    """The factor (out,) that brings each row of `made` nearest to `weight` in what it does to the inputs: wHŵ / ŵHŵ.

    weight and made (out, in), gram H (in, in). `whole`: one factor for all rows. 1 where a row is 0, or would turn or grow out of
    proportion.
    """
    moved = made @ gram
    above, below = (moved * weight).sum(1), (moved * made).sum(1)
    if whole:
        above, below = above.sum().expand(len(made)), below.sum().expand(len(made))
    factor = above / below
    return torch.where((factor > 0.5) & (factor < 2), factor, 1.0)
