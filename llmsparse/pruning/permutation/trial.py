"""Whether the inputs of a matrix fold: what computes them is reordered in the module, and they must come in that order."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from llmsparse.models.streamed import Activations, Block, Slot
from llmsparse.models.tap import Tap
from llmsparse.pruning.permutation.fold import Fold
from llmsparse.pruning.permutation.layout import Layout

SEED = 1  # of the order that is tried: any that leaves nothing in its place will do
SAME = 1e-5  # relative difference of fp32; in fewer bits what they round


def allowed(dtype: torch.dtype) -> float:
    """The relative difference that another order of the same sums may make."""
    return max(SAME, 2 * torch.finfo(dtype).eps)


@torch.no_grad()
def folding_layout(block: Block, acts: Activations, fold: Fold) -> int | None:
    """The number of the layout by which the channels can be reordered, or None: the block does not compute them so."""
    wanted, output = _entering(block, acts, fold.into)
    if not wanted:
        return None
    for number, layout in enumerate(fold.layouts):
        generator = torch.Generator().manual_seed(SEED)
        orders = [torch.randperm(layout.length, generator=generator) for _ in range(layout.pieces)]
        sources = layout.into.sources(orders)
        with _exchanged(block, layout.reordered(_parameters(block, layout), [orders] * (fold.experts or 1))):
            met, result = _entering(block, acts, fold.into)
        in_order = wanted.keys() == met.keys() and all(_same(met[slot], x[:, sources]) for slot, x in wanted.items())
        if in_order and _same(result, output):  # nothing else reads these channels
            return number
    return None


def difference(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖."""
    return float((one.float() - other.float()).norm()) / max(float(other.float().norm()), 1e-30)


def _same(met: Tensor, wanted: Tensor) -> bool:
    return met.shape == wanted.shape and difference(met, wanted) <= allowed(wanted.dtype)


def _parameters(block: Block, layout: Layout) -> Mapping[str, Tensor]:
    return {axis.name: block.module.get_parameter(axis.name).data for axis in (layout.into, *layout.out)}


def _entering(block: Block, acts: Activations, name: str) -> tuple[dict[Slot, Tensor], Tensor]:
    """What enters a parameter in the first batch, by expert, and what the block gives."""
    found: dict[Slot, list[Tensor]] = {}

    def note(slot: Slot, x: Tensor) -> None:
        if slot[0] == name and len(x):
            found.setdefault(slot, []).append(x.clone())

    with Tap(block, note):
        output = block.call(acts, 0)
    return {slot: torch.cat(parts) for slot, parts in found.items()}, output.clone()


@contextmanager
def _exchanged(block: Block, others: Mapping[str, Tensor]) -> Generator[None]:
    """Within it the module has other values."""
    parameters = {name: block.module.get_parameter(name) for name in others}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = others[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]
