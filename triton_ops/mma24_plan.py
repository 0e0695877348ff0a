"""How `mma24` cuts a product."""

# pyright: basic
from __future__ import annotations

from typing import NamedTuple

import triton


class Plan(NamedTuple):
    """How a product is cut."""

    tiles: int  # of 16 rows, that a warp owns: they share what it loads of x
    warps: int  # of a program; they share the inputs of its rows
    group: int  # fragments of a tile that are loaded anew together, once used: 1, 2, 4 or 8
    direct: bool  # x is read as it stands, instead of put in the order of the registers first; up to 8 tokens
    parts: int  # programs that share the inputs of the same rows


PLANS = {  # most tokens → plan, for rows enough
    1: Plan(1, 8, 2, True, 1),
    8: Plan(2, 8, 2, True, 1),  # 8 tokens are half as many bytes as their tile of the weight: two tiles share them
    32: Plan(2, 8, 2, False, 1),
}
WARPS_WANTED = 1024  # about 8 for each multiprocessor of an H100 or H200, with 3 to 6 KB of the weight under way each


def plan(n: int, k: int, m: int) -> Plan:
    """The plan for a weight (N, K) and M tokens; a function of the shape alone, so that results do not depend on the
    device. Where rows are few, more programs share their inputs, as long as each warp is left a block of 256."""
    chosen = next(plan for most, plan in PLANS.items() if m <= most)
    programs, blocks = triton.cdiv(triton.cdiv(n, 16), chosen.tiles), triton.cdiv(k, 256)
    parts = min(WARPS_WANTED // (programs * chosen.warps), blocks // chosen.warps)
    return chosen._replace(parts=max(parts, 1))
