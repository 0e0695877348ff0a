"""What a pass of the calibration batches through a block measures, and how far off a weight is on what it kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from llmsparse.calibration.inputs import Input
from llmsparse.sparsity.stats import Statistic


def passes(
    inputs: list[Input],
    needs: Callable[[Input], type[Statistic] | None],
    budget: int,
    *,
    one_by_one: bool = False,
) -> Iterator[list[Input]]:
    """Inputs measured in one pass: as many as `budget` bytes of statistics allow, at least one; or just one."""
    held: list[Input] = []
    size = 0
    for entry in inputs:
        needed = needs(entry)
        bytes_needed = needed.nbytes(entry.width) if needed else 0
        if held and (one_by_one or size + bytes_needed > budget):
            yield held
            held, size = [], 0
        held.append(entry)
        size += bytes_needed
    yield held


def output_error(dense: Tensor, made: Tensor, entry: Input) -> float | None:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² over the sampled rows X (rows, in); None where no row was seen."""
    if entry.tokens == 0:
        return None
    x = entry.sample.float()
    energy = (x @ dense.T).square().sum().item()
    return (x @ (dense - made).T).square().sum().item() / energy if energy > 0 else 0.0
