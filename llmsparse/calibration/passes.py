"""What a pass of the calibration batches through a block measures, and how far off a weight is on what it kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from torch import Tensor

from llmsparse.calibration.inputs import Input
from llmsparse.ranks.share import Share
from llmsparse.ranks.tree import held_at_once
from llmsparse.sparsity.stats import Gram, Statistic


def passes(
    inputs: list[Input],
    needs: Callable[[Input], type[Statistic] | None],
    budget: int,
    *,
    one_by_one: bool = False,
    share: Share,
) -> Iterator[list[Input]]:
    """Inputs measured in one pass: as many as `budget` bytes of statistics allow, at least one; or just one. Of several
    processes the first decides, and each input gets an owner."""
    needed = [needs(entry) for entry in inputs]
    ranks, held = share.ranks, held_at_once(share.total)
    sizes = [held * kind.nbytes(entry.width) if kind else 0 for kind, entry in zip(needed, inputs, strict=True)]
    counts = [1] * len(inputs) if one_by_one else ranks.broadcast(_counts(sizes, budget), 0)
    for stop, count in zip(accumulate(counts), counts, strict=True):
        group = inputs[stop - count : stop]
        costs = [solving(entry, kind) for entry, kind in zip(group, needed[stop - count : stop], strict=True)]
        for entry, owner in zip(group, ranks.assigned(costs), strict=True):
            entry.owner = owner
        yield group


def _counts(sizes: list[int], budget: int) -> list[int]:
    """How many inputs go into each pass."""
    counts, held = [0], 0
    for size in sizes:
        if counts[-1] and held + size > budget:
            counts.append(0)
            held = 0
        counts[-1] += 1
        held += size
    return counts


def solving(entry: Input, kind: type[Statistic] | None) -> float:
    """About how many products of numbers it takes to work on the weights of an input."""
    numel = sum(weight.shape[0] * weight.shape[1] for weight in entry.weights)
    if kind is None or not issubclass(kind, Gram):
        return numel
    return entry.width**3 / 3 + numel * entry.width


def output_error(
    dense: Tensor, made: Callable[[slice], Tensor], entry: Input, parts: Sequence[slice] = (slice(None),)
) -> float | None:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² over the sampled rows X (rows, in), Ŵ made in parts; None where no row was seen."""
    if entry.tokens == 0:
        return None
    x, energy, lost = entry.sample.float(), 0.0, 0.0
    for part in parts:
        energy += (x @ dense[part].T).square().sum().item()
        lost += (x @ (dense[part] - made(part)).T).square().sum().item()
    return lost / energy if energy > 0 else 0.0
