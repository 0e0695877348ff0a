"""One weight: its steps, its numbers, and how many bits they take."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.formats.digits import LARGEST
from llmsparse.formats.nested import STEPS, Nested, rows_sharing
from llmsparse.formats.shortest import shortest_code
from llmsparse.packing.values import value_steps
from llmsparse.pruners.sparsegpt import factor_hessian
from llmsparse.quantization.gptq import quantize_columns, refitted
from llmsparse.quantization.rounding import round_by, thresholds
from llmsparse.quantization.search import step_for
from llmsparse.sparsity.patterns import is_sparse
from llmsparse.sparsity.stats import Gram

START = 1.2  # steps in root mean squares of a row, where the search begins ...
LEAST, MOST = 2**-5, 6.0  # ... and between which it stays
PART = 16384  # rows of a head that are solved at a time: they do not know of one another
TRIED_ROWS = 256  # of a larger weight only so many rows, evenly spread, are tried until their step fits


@dataclass(frozen=True)
class Quantized:
    """W ≈ steps · q."""

    q: Tensor  # int8 (out, in)
    steps: Tensor  # bfloat16 (out, groups)
    step: float | None  # in root mean squares of a row, where that decided
    notes: dict[str, float]

    def dense(self, group: int, rows: slice = slice(None)) -> Tensor:
        """fp32 (out, in), or some rows of it."""
        return self.q[rows] * self.steps[rows].float().repeat_interleave(group, dim=1)[:, : self.q.shape[1]]


@dataclass(frozen=True)
class Problem:
    """A weight (out, in) fp32, what is known of its input, and how it may be written."""

    weight: Tensor
    stat: Gram | None  # None: every number by itself
    group: int  # columns that share a step
    rate: float
    damp: float
    whole: bool = False  # all rows share the step, too
    sparse: bool | None = None  # whether the weight this is a part of is sparse; None: the weight itself says

    @property
    def zeros(self) -> float:
        return 1 - int(self.weight.count_nonzero()) / max(1, self.weight.numel())

    @property
    def keep(self) -> Tensor | None:
        """Of a weight that is sparse already: where it is not 0."""
        sparse = is_sparse(self.weight) if self.sparse is None else self.sparse
        return self.weight != 0 if sparse else None

    def rows(self, chosen: Tensor | slice) -> Problem:
        return replace(self, weight=self.weight[chosen], sparse=self.keep is not None)

    def to_bits(self, bits: float, start: float) -> Quantized:
        """Uniform steps without an end, as large as makes it take `bits` a weight."""
        out = len(self.weight)
        if out > 2 * TRIED_ROWS:
            some = self.rows(torch.linspace(0, out - 1, TRIED_ROWS).long().to(self.weight.device))
            start = step_for(bits, some._attempt, start, least=LEAST, most=MOST).step
        trial = step_for(bits, self._attempt, start, least=LEAST, most=MOST)
        return self._finished(*trial.made, trial.step)

    def to_values(self, largest: int) -> Quantized:
        """Numbers up to ±`largest` for what is not 0."""
        if len(self.weight) > PART:
            made = [self.rows(part).to_values(largest) for part in parts(len(self.weight))]
            return Quantized(torch.cat([one.q for one in made]), torch.cat([one.steps for one in made]), None, {})
        importance = self.stat.xtx.diagonal() if self.stat else None
        steps = value_steps(self.weight, largest, self.group, importance)
        rounding = partial(round_by, above=thresholds(self.weight, 0.0), most=largest)
        return self._finished(self._solve(steps, rounding), steps, None)

    def _attempt(self, step: float) -> tuple[float, tuple[Tensor, Tensor]]:
        """Bits of a step that is so many root mean squares of what is not 0 in a row, or a group of it; q and steps."""
        places = self.weight.new_ones(self.weight.shape) if self.keep is None else self.keep.float()
        squares = self._grouped(self.weight.square(), lambda part: part.sum(2))
        count, most = (
            self._grouped(places, lambda part: part.sum(2)),
            self._grouped(self.weight.abs(), lambda part: part.amax(2)),
        )
        if self.whole:
            squares, count, most = squares.sum(0, True), count.sum(0, True), most.amax(0, True)
        # what no code could write becomes larger steps: one number in thousands, in a row of outliers
        rms = torch.maximum((squares / count.clamp_min(1)).sqrt(), most / (step * LARGEST / 2))
        rms = rms.expand(len(self.weight), -1).contiguous()
        steps = _as_steps(step * rms)
        quotients = self.weight / self._spread(steps.float())
        if self.keep is not None:
            quotients = quotients[self.keep]
        rounding = partial(round_by, above=thresholds(quotients, self.rate), most=LARGEST)
        q = self._solve(steps, rounding)
        return bits_of(q, steps), (q, steps)

    def _solve(self, steps: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        each = steps.float()
        if self.stat is None:
            q = rounding(self.weight / self._spread(each))
            return (q if self.keep is None else q * self.keep).to(torch.int8)
        m, _, _ = self.stat.factor(("sparsegpt", self.damp), lambda: factor_hessian(self._gram, self.damp))
        return quantize_columns(self.weight, m, each, self.group, rounding, self.keep)

    @property
    def _gram(self) -> Gram:
        assert self.stat is not None
        return self.stat

    def _finished(self, q: Tensor, steps: Tensor, step: float | None) -> Quantized:
        if self.stat is not None:
            gram = self.stat.xtx + self.damp * self.stat.xtx.diagonal().mean() * torch.eye(
                len(self.stat.xtx), device=q.device
            )
            factor = refitted(self.weight, q * self._spread(steps.float()), gram, whole=self.whole)
            steps = (steps.float() * factor[:, None]).to(STEPS)
        return Quantized(q, steps, step, {})

    def _spread(self, steps: Tensor) -> Tensor:
        """(out, groups) → (out, in)."""
        return steps.repeat_interleave(self.group, dim=1)[:, : self.weight.shape[1]]

    def _grouped(self, values: Tensor, reduced: Callable[[Tensor], Tensor]) -> Tensor:
        """(out, in) → (out, groups)."""
        return reduced(values.view(len(values), -1, self.group))


def parts(rows: int) -> list[slice]:
    """Rows, `PART` at a time."""
    return [slice(start, start + PART) for start in range(0, rows, PART)]


def bits_of(q: Tensor, steps: Tensor) -> float:
    """Bits a weight that are stored, but for what fills up bytes."""
    beside = 8 * steps.nbytes // rows_sharing(steps) + 32
    return (shortest_code(q.cpu().numpy())[1] + beside) / max(1, q.numel())


def _as_steps(steps: Tensor) -> Tensor:
    """As they are stored, above 0. NumericalError for what is no number."""
    if not bool(steps.isfinite().all()):
        raise NumericalError("a weight that is NaN or Inf has no step; check the checkpoint")
    return torch.where(steps > 0, steps, 1.0).to(STEPS)


def coded(q: Tensor, steps: Tensor, dtype: torch.dtype) -> Nested:
    """q (..., out, in) and steps (..., out, groups) as they are stored."""
    return Nested.encode(q.contiguous(), steps.reshape(-1, steps.shape[-1]).contiguous(), dtype)
