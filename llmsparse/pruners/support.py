"""The weights on a support that is given, solved for by conjugate gradients."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-5  # of a row's residual, relative to its right-hand side


def solve_on_support(target: Tensor, h: Tensor, b: Tensor, keep: Tensor, iterations: int) -> tuple[Tensor, float]:
    """Rows moved to the minimum on their support, (B H)_S = target_S, by conjugate gradients that start from `b`; and the
    largest residual of a row, relative to its right-hand side, that is left."""
    tiny = torch.finfo(b.dtype).tiny
    r = (target - b @ h).masked_fill_(~keep, 0.0)
    p, size = r, r.square().sum(dim=1, keepdim=True)
    enough = TOLERANCE**2 * target.square().sum(dim=1, keepdim=True)
    for _ in range(iterations):
        if bool((size <= enough).all()):
            break
        hp = (p @ h).masked_fill_(~keep, 0.0)
        step = size / (p * hp).sum(dim=1, keepdim=True).clamp_min(tiny)
        b, r = torch.addcmul(b, step, p), torch.addcmul(r, step, hp, value=-1)
        before, size = size, r.square().sum(dim=1, keepdim=True)
        p = torch.addcmul(r, size / before.clamp_min(tiny), p)
    left = size / target.square().sum(dim=1, keepdim=True).clamp_min(tiny)
    return b, left.max().sqrt().item()
