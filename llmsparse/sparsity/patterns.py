"""Which weights survive: a score in, a keep-mask out, with exact counts.

A pattern sees scores and never weights. It can be asked for a whole matrix or for consecutive column blocks of it, and the
blocks add up: after columns [0, b) of an (out, in) weight, `Unstructured` has pruned exactly `round(sparsity * (out * b))`
entries (scope matrix) or `round(sparsity * b)` in each row (scope row), with Python's `round` on the float product.
Among equal scores the lower index is pruned first (row-major for a matrix), so a mask depends on nothing but the scores.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from llmsparse.errors import NumericalError, PatternError

Scope = Literal["row", "matrix"]

SPARSE = 0.05  # share of zeros that no dense weight has by chance
PATTERNS = ((1, 8), (1, 4), (2, 8), (2, 4), (4, 8))  # N:M that is looked for in a weight, the narrowest first
SORTED = (
    2**20
)  # up to so long rows are sorted on a GPU: solvers ask for one mask after the other, and waiting costs most
PAIRED = 4  # up to this M comparing every pair of a group is faster than partitioning it (CPU, 2048 × 8192)


class Pattern(Protocol):
    """Turns importance scores into a keep-mask."""

    @property
    def span(self) -> int:
        """Consecutive columns that are decided together: M for N:M, 1 if unstructured."""
        ...

    @property
    def sparsity(self) -> float:
        """Fraction of zeros this leads to."""
        ...

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raise `PatternError` where the weight `name` of `shape` (out, in) cannot be covered."""
        ...

    def keep(self, score: Tensor, columns: slice, width: int, *, checked: bool = False) -> Tensor:
        """Mask for the columns [start, stop) of a weight with `width` inputs.

        `score` is (out, stop - start), larger is more important; the result is bool of the same shape, True survives.
        Raises `NumericalError` where a score is NaN, unless it is `checked` already: looking makes a GPU wait.
        """
        ...


@dataclass(frozen=True)
class Unstructured:
    """A fraction of all entries, wherever they are: of each row, or of the whole matrix."""

    sparsity: float
    scope: Scope
    span: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise PatternError(
                f"sparsity {self.sparsity:g} is not a fraction of zeros: give at least 0 and less than 1"
            )

    def __str__(self) -> str:
        return "unstructured"

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Any shape will do."""

    def keep(self, score: Tensor, columns: slice, width: int, *, checked: bool = False) -> Tensor:
        if not checked:
            refuse_nan(score)
        if self.scope == "row":
            return _drop_smallest(score, self._zeros(1, columns))
        return _drop_smallest(score.reshape(1, -1), self._zeros(score.shape[0], columns)).view(score.shape)

    def _zeros(self, rows: int, columns: slice) -> int:
        return round(self.sparsity * (rows * columns.stop)) - round(self.sparsity * (rows * columns.start))


@dataclass(frozen=True)
class NofM:
    """Keep `n` of every `m` consecutive inputs, in every row."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise PatternError(f"pattern {self}: N:M keeps N of every M weights, so 0 < N < M is needed, as in 2:4")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def span(self) -> int:
        return self.m

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m

    def check(self, name: str, shape: tuple[int, int]) -> None:
        if shape[1] % self.m:
            raise PatternError(
                f"{name}: in_features {shape[1]} is not a multiple of {self.m}, so {self} cannot cover it; "
                f"leave it out with --exclude '{name}'"
            )

    def keep(self, score: Tensor, columns: slice, width: int, *, checked: bool = False) -> Tensor:
        if columns.start % self.m or score.shape[1] % self.m:
            raise PatternError(f"columns {columns.start} to {columns.stop} of {width} are not whole groups of {self.m}")
        if not checked:
            refuse_nan(score)
        groups = score.reshape(-1, self.m)
        if self.m > PAIRED:
            return _drop_smallest(groups, self.m - self.n).view(score.shape)
        rank = torch.zeros(groups.shape, dtype=torch.int8, device=score.device)
        for j in range(1, self.m):
            for i in range(j):
                later = groups[:, j] >= groups[:, i]  # on a tie the later one is the more important
                rank[:, j] += later
                rank[:, i] += ~later
        return (rank >= self.m - self.n).view(score.shape)


@dataclass(frozen=True)
class KeepingZeros:
    """A pattern under which what is 0 already, True in `zeros` (out, in), goes first and stays away.

    Where more of it is 0 than the pattern asks for, the mask is sparser than the pattern.
    """

    pattern: Pattern
    zeros: Tensor

    @property
    def span(self) -> int:
        return self.pattern.span

    @property
    def sparsity(self) -> float:
        return self.pattern.sparsity

    def __str__(self) -> str:
        return str(self.pattern)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        self.pattern.check(name, shape)

    def keep(self, score: Tensor, columns: slice, width: int, *, checked: bool = False) -> Tensor:
        zeros = self.zeros[:, columns]
        return self.pattern.keep(score.masked_fill(zeros, -torch.inf), columns, width, checked=checked) & ~zeros


def parse_pattern(text: str, sparsity: float | None, scope: Scope) -> Pattern:
    """`unstructured` or `N:M` as written in a recipe; `sparsity` and `scope` are for the former.

    Raises `PatternError` for anything else, for `unstructured` without a sparsity, and for an N:M that implies another one.
    """
    if text == "unstructured":
        if sparsity is None:
            raise PatternError("pattern unstructured needs a sparsity, for example 0.5")
        return Unstructured(sparsity, scope)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise PatternError(f"unknown pattern '{text}': give unstructured, or N:M such as 2:4 (keep 2 of every 4)")
    pattern = NofM(int(match[1]), int(match[2]))
    if sparsity is not None and abs(sparsity - pattern.sparsity) > 1e-6:
        raise PatternError(
            f"pattern {pattern} means sparsity {pattern.sparsity:g}, not {sparsity:g}; give only one of them"
        )
    return pattern


def is_sparse(weight: Tensor) -> bool:
    """More of it is 0 than is by chance: these zeros were made, and stay."""
    return 1 - weight.count_nonzero().item() / max(1, weight.numel()) > SPARSE


def refuse_nan(score: Tensor) -> None:
    """NumericalError where a score is NaN."""
    if bool(score.sum().isnan()) and bool(
        score.isnan().any()
    ):  # the sum is ten times as fast, but +inf - inf is NaN too
        broken = int(score.isnan().sum())
        raise NumericalError(
            f"{broken} of {score.numel()} importance scores are NaN: the weight or its calibration activations hold NaN or Inf; "
            "check the checkpoint, or calculate with --dtype float32"
        )


def _drop_smallest(score: Tensor, count: int) -> Tensor:
    """Mask of (rows, n) without the `count` smallest of each row; of equals the first go first."""
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    rows, n = score.shape
    if score.device.type != "cpu" and n <= SORTED:
        return drop_first_of_sorted(score, count)
    threshold = _kth_smallest(score, count)
    keep = score > threshold  # at most n - count in every row, so if the total is right each row is
    if int(keep.count_nonzero()) == rows * (n - count):
        return keep
    missing = n - count - _per_row(keep)
    short = missing.nonzero()[:, 0]
    row, column = (score[short] == threshold[short]).nonzero(as_tuple=True)  # the tied, in order
    from_end = row.bincount(minlength=len(short)).cumsum(dim=0)[row] - torch.arange(len(row), device=row.device)
    last = from_end <= missing[short][row]
    keep[short[row[last]], column[last]] = True
    return keep


def drop_first_of_sorted(score: Tensor, count: int) -> Tensor:
    """Mask of (rows, n) without the `count` smallest of each row, of equals the first: by a stable sort, which takes more
    time and memory than a partition but never makes the host wait for the device."""
    dropped = score.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, dropped, False)


def _kth_smallest(score: Tensor, k: int) -> Tensor:
    """(rows, n) → (rows, 1)."""
    if score.device.type == "cpu":  # numpy's partition takes a sixth of the time of torch's kthvalue, at 2048 × 8192
        return torch.from_numpy(np.partition(score.numpy(), k - 1, axis=1)[:, k - 1 : k])
    n = score.shape[1]  # topk spreads one long row over the whole device, kthvalue does not
    if k <= n - k + 1:
        return score.topk(k, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    return score.topk(n - k + 1, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def _per_row(mask: Tensor) -> Tensor:
    """How many are True, (rows, n) → (rows,)."""
    if mask.device.type == "cpu":  # torch's sum of bools takes fifteen times as long
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return mask.sum(dim=1)
