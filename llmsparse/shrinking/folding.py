"""What blocks that go would have added, taken over by the block before them, as far as its last matrix can.

A block gives r + Wh, h what enters its last matrix; the blocks that go would have made y of that. The best linear map of h
that comes close to it is fitted in closed form and *is* the matrix W̃ = argmin Σ ‖(y − r) − W̃h‖² + λ‖W̃ − W‖²: nothing is
added to the model (as in ReplaceMe, arXiv 2505.02819, whose linear map is folded into the same place).
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmsparse.calibration.least_squares import HELD_BACK, JUDGES, error, fit
from llmsparse.models.streamed import Activations, Block, Slot, Weight
from llmsparse.models.tap import Tap
from llmsparse.sparsity.patterns import is_sparse
from llmsparse.sparsity.stats import Gram

ADDED = 0.05  # relative difference between Wh and what it adds to the output of a block, beside rounding


@dataclass(frozen=True)
class Folded:
    """What came of it: how far the output was from where the blocks that went would have taken it, relative to what they
    added, on tokens held back."""

    projection: str
    error: float
    damp: float

    def to_json(self) -> dict[str, Any]:
        return {"projection": self.projection, "error": self.error, "damp": self.damp}


@torch.no_grad()
def fold(
    made: Block, acts: Activations, beyond: Callable[[list[Tensor]], list[Tensor]], hidden_size: int
) -> Folded | None:
    """Fit the last matrix of `made`, in `made.stored`; `acts` enter it, `beyond` takes its outputs, one (batch, tokens, width) a
    batch held here, through what went. None where no fit is better on tokens held back, or where the last matrix does not add to the
    output as it is: behind a norm, or in experts."""
    weight = last_matrix(made.weights, hidden_size)
    if weight is None:
        return None
    device = made.module.get_parameter(weight.slot[0]).device
    matrix = made.view(weight).to(device, torch.float32)  # (out, in)
    if is_sparse(matrix):  # a fit would fill its zeros
        return None
    share = acts.share
    if not share.ranks.known(lambda: adds_up(made, acts, weight, matrix)):
        return None
    wanted = beyond([made.call(acts, batch).to(hidden.device) for batch, hidden in enumerate(acts.hidden)])

    def leaf(number: int) -> list[_Sums]:
        sums = _Sums(Gram(matrix.shape[1], device), torch.zeros(matrix.shape[1], matrix.shape[0], device=device))
        seen = share.tokens_before(number)
        for batch in share.leaves[number]:
            place = share.place(batch)
            entering, output = entering_last(made, acts, place, weight.slot)
            more = (wanted[place].to(output.device).float() - output.float()).flatten(0, -2)  # what went adds this
            y = entering @ matrix.T + more  # (tokens, width)
            judge = torch.arange(seen, seen + len(y), device=y.device) % HELD_BACK == HELD_BACK - 1
            seen += len(y)
            if sum(len(h) for h, _ in sums.judges) < JUDGES // len(share.leaves):
                sums.judges.append((entering[judge], y[judge]))
                sums.added += more[judge].square().sum().item()
            sums.gram.update(entering[~judge])
            sums.targets += entering[~judge].T @ y[~judge]
        return [sums]

    def solved() -> tuple[Tensor, Folded] | None:
        assert total is not None
        fitted = fit(total.gram.xtx, total.targets, matrix, total.judges)
        if fitted.damp is None or not total.added:
            return None
        off = error(fitted.weight, total.judges) / total.added
        return fitted.weight, Folded(weight.name, off, fitted.damp)

    [total] = share.summed(leaf, _Sums.merge, [0])
    found = share.ranks.known(solved)
    if found is None:
        return None
    made.stored = made.stored | {weight.key: made.stored[weight.key].clone()}
    with share.ranks.together():
        made.store(weight, found[0])
    made.reload({weight.key})
    return found[1]


@dataclass
class _Sums:
    """Of some batches."""

    gram: Gram
    targets: Tensor  # (in, width)
    judges: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])
    added: float = 0.0  # Σ ‖·‖² of what the blocks that went added to the tokens held back

    def merge(self, other: _Sums) -> _Sums:
        """These, with later batches."""
        self.gram.merge(other.gram)
        self.targets += other.targets
        self.judges += other.judges
        self.added += other.added
        return self


def last_matrix(weights: Iterable[Weight], hidden_size: int) -> Weight | None:
    """Of a block's, the one that it multiplies with last of those that give a hidden state; None where that is an expert's."""
    giving = [weight for weight in weights if weight.prunable and weight.shape[0] == hidden_size]
    return giving[-1] if giving and giving[-1].kind == "linear" else None


def adds_up(block: Block, acts: Activations, weight: Weight, matrix: Tensor) -> bool:
    """Whether the output of a block is its output without the matrix, and Wh."""
    entering, output = entering_last(block, acts, 0, weight.slot)
    parameter = block.module.get_parameter(weight.slot[0])
    return adds(parameter, entering @ matrix.T, output, lambda: block.call(acts, 0))


def adds(parameter: Tensor, expected: Tensor, output: Tensor, run: Callable[[], Tensor]) -> bool:
    """Whether `output` is what `run` gives without this matrix, and `expected` (tokens, width), what the matrix gives."""
    own = parameter.data
    try:
        parameter.data = torch.zeros_like(own)
        without = run()
    finally:
        parameter.data = own
    found = (output.float() - without.float()).flatten(0, -2)
    rounding = 2 * torch.finfo(output.dtype).eps * length(output)
    return length(found - expected) <= ADDED * length(expected) + rounding


def length(x: Tensor) -> float:
    """‖x‖."""
    return float(x.float().square().sum().sqrt())


def entering_last(block: Block, acts: Activations, batch: int, slot: Slot) -> tuple[Tensor, Tensor]:
    """What enters a matrix in one batch, (tokens, in) fp32, and the output of the block."""
    found: list[Tensor] = []

    def note(at: Slot, x: Tensor) -> None:
        if at == slot:
            found.append(x.float())

    with Tap(block, note):
        output = block.call(acts, batch)
    return torch.cat(found), output
