"""What is not 0 in a sparse weight as integers of 8 or 4 bits: steps a row or a group, and the nearest numbers."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import torch
from torch import Tensor

from llmsparse.formats.nested import STEPS, Nested

LARGEST = {"int8": 127, "int4": 7}  # |q|
GROUPS = {"int8": 0, "int4": 128}  # columns that share a step, where that divides; 0: a row
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the largest value that few numbers reach: the best is taken


def group_of(values: str, width: int) -> int:
    """Columns that share a step where nobody says how many."""
    group = GROUPS[values]
    return group if group and width % group == 0 else max(1, width)


def value_steps(weight: Tensor, largest: int, group: int, importance: Tensor | None = None) -> Tensor:
    """Steps, bfloat16 (rows, in / group), at which numbers of at most `largest` lose least of a weight (rows, in).

    `importance` (in,): of an error in each column. At 127 it is the largest value that decides, and nothing is clipped.
    """
    grouped = weight.view(len(weight), -1, group)  # (rows, groups, group)
    extent = grouped.abs().amax(2) / largest
    important = 1.0 if importance is None else importance.view(-1, group)
    best = torch.full_like(extent, torch.inf)
    steps = torch.ones_like(extent, dtype=STEPS)
    for shrink in SHRINK if largest < LARGEST["int8"] else SHRINK[:1]:
        tried = torch.where(extent > 0, extent * shrink, 1.0).to(STEPS)
        if shrink == 1.0:  # rounded up: nothing is clipped
            tried = torch.where(tried.float() < extent, tried * (1 + 2**-7), tried).to(STEPS)
        each = tried.float()[..., None]
        lost = (grouped - (grouped / each).round().clamp(-largest, largest) * each).square() * important
        error = lost.sum(2)
        steps, best = torch.where(error < best, tried, steps), torch.minimum(error, best)
    return steps


def coded_values(weight: Tensor, values: str) -> Nested:
    """A weight (..., out, in) with every number by itself, as it is stored."""
    rows, largest = weight.reshape(-1, weight.shape[-1]).float(), LARGEST[values]
    group = group_of(values, rows.shape[1])
    steps = value_steps(rows, largest, group)
    each = steps.float().repeat_interleave(group, dim=1)
    q = (rows / each).round().clamp(-largest, largest).to(torch.int8)
    return Nested.encode(q.view(weight.shape), steps, weight.dtype)
