"""The columns of one block of SparseGPT in one launch: each is pruned, and those to its right absorb what that cost.

In symbols of `llmsparse/pruners/sparsegpt.py`: with M unit lower triangular and `entering` what all columns to the left
of the block have sent into it, column j loses z_j = w_j − k_j (entering_j + Σ_{i<j} M_ji z_i), k_j being 1 where it is
kept. Of N:M groups the mask is found on the way: before the first column of a group is pruned, u solves M u = g − w within
the group, g being what has arrived, and the N largest (w + u)² D² survive, of equal ones those further right.

Rows do not know of one another, so a program takes a few of them through all columns; a launch instead of three for each
column, which on a GPU is most of the time of a solve. fp32, which is what solvers compute in. Compiled for sm_90 without
spills, and run in the interpreter; it has not run on hardware.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # of a program, which is one warp: sums over columns stay inside it
WARPS = 1
MOST = 128  # columns: a tile of ROWS × MOST fp32 in registers


@triton.jit
def _absorb(entering, weight, m, scale, keep, lost, rows, columns, N: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
            COLUMNS: tl.constexpr):  # fmt: skip
    # entering, weight, lost, keep (rows, columns), so that a warp holds whole rows; row j of m is column j of M
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    place = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    g = tl.load(entering + place, mask=inside, other=0.0)
    w = tl.load(weight + place, mask=inside, other=0.0)
    k = tl.zeros((ROWS, COLUMNS), tl.int32)
    d = tl.load(scale + column, mask=column < columns, other=0.0)
    if M == 1:
        k = tl.load(keep + place, mask=inside, other=0).to(tl.int32)
    for first in range(0, columns, M):
        if M > 1:
            u = g - w
            for i in tl.static_range(M):
                j = first + i
                below = tl.load(m + j * columns + column, mask=(column > j) & (column < first + M), other=0.0)
                u -= below[None, :] * tl.sum(tl.where(column[None, :] == j, u, 0.0), axis=1)[:, None]
            score = (w + u) * d[None, :]
            score = score * score
            rank = tl.zeros((ROWS, COLUMNS), tl.int32)  # how many of the group are less important
            for i in tl.static_range(M):
                j = first + i
                other = tl.sum(tl.where(column[None, :] == j, score, 0.0), axis=1)[:, None]
                later = (column > j)[None, :]
                rank += ((later & (score >= other)) | ((column < j)[None, :] & (score > other))).to(tl.int32)
            k = tl.where(((column >= first) & (column < first + M))[None, :], (rank >= M - N).to(tl.int32), k)
        for i in tl.static_range(M):
            j = first + i
            this = column[None, :] == j
            z = tl.sum(tl.where(this, w - g * k.to(tl.float32), 0.0), axis=1)
            tl.store(lost + row * columns + j, z, mask=row < rows)
            right = tl.load(m + j * columns + column, mask=(column > j) & (column < columns), other=0.0)
            g += right[None, :] * z[:, None]
    if M > 1:
        tl.store(keep + place, k.to(tl.int8), mask=inside)


def absorb(entering: Tensor, weight: Tensor, m: Tensor, keep: Tensor) -> Tensor:
    """What each column loses, (columns, rows) fp32, for a mask `keep` (columns, rows) bool; equals `reference.absorb`.

    `entering` and `weight` (columns, rows) fp32, a column of the weight a row here; `m` (columns, columns) unit lower
    triangular. At most 128 columns; ValueError where shapes or dtypes do not fit.
    """
    return _launch(entering, weight, m, weight.new_empty(len(weight)), keep, 1, 1)[0]


def absorb_groups(entering: Tensor, weight: Tensor, m: Tensor, scale: Tensor, n: int, of: int) -> tuple[Tensor, Tensor]:
    """What each column loses, and the mask, which keeps `n` of every `of` columns; equals `reference.absorb_groups`.

    As `absorb`; `scale` (columns,) is D. `columns` is a multiple of `of`.
    """
    return _launch(entering, weight, m, scale, torch.empty_like(weight, dtype=torch.bool), n, of)


def _launch(
    entering: Tensor, weight: Tensor, m: Tensor, scale: Tensor, keep: Tensor, n: int, of: int
) -> tuple[Tensor, Tensor]:
    columns, rows = weight.shape
    if columns > MOST or columns % of:
        raise ValueError(f"absorb: wants at most {MOST} columns in groups of {of}, got {columns}")
    if entering.shape != weight.shape or {entering.dtype, weight.dtype, m.dtype, scale.dtype} != {torch.float32}:
        raise ValueError(f"absorb: entering {tuple(entering.shape)} must be fp32 of {tuple(weight.shape)}, as all else")
    if m.shape != (columns, columns) or keep.shape != weight.shape or scale.shape != (columns,):
        raise ValueError(
            f"absorb: m {tuple(m.shape)}, keep {tuple(keep.shape)} and scale {tuple(scale.shape)} do not fit"
        )
    mask = keep.T.to(torch.int8).contiguous()
    lost = torch.empty(rows, columns, device=weight.device)
    _absorb[(triton.cdiv(rows, ROWS),)](
        entering.T.contiguous(), weight.T.contiguous(), m.T.contiguous(), scale, mask, lost, rows, columns, N=n, M=of,
        ROWS=ROWS, COLUMNS=max(16, triton.next_power_of_2(columns)), num_warps=WARPS,
    )  # fmt: skip
    return lost.T, mask.T.bool()
