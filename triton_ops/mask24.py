"""Which two of every four inputs a 2:4 weight keeps. Plain torch: it runs where the weight is, at load time."""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32}  # bytes a weight → the integer of its bits


def mask24(weight: Tensor) -> Tensor:
    """(N, K) float → (N, K) bool, True for the two of largest magnitude in every group of four inputs; of equal ones,
    those further left.

    Equals `reference.mask24`, in comparisons instead of a sort: one is kept if fewer than two stand before it. The
    magnitudes are compared as integers, which order as the floats do and give NaN a place (above infinity), so that it
    is two also there. ValueError where K is not a multiple of 4.
    """
    need_groups(weight)
    size = INTEGERS[weight.element_size()]
    a, b, c, d = weight.abs().contiguous().view(size).unflatten(1, (-1, 4)).unbind(-1)  # each (N, K/4)
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d  # the left one stands before
    # of three contests, at least two are won: a majority
    keep = (_most(ab, ac, ad), _most(~ab, bc, bd), _most(~ac, ~bc, cd), _most(~ad, ~bd, ~cd))
    return torch.stack(keep, dim=-1).flatten(1)


def need_groups(weight: Tensor) -> None:
    """ValueError unless the weight is a matrix whose rows are groups of four."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise ValueError(f"2:4 needs a weight (N, K) with K a multiple of 4, got {tuple(weight.shape)}")


def _most(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a & b | c & (a | b)
