"""A block whose inputs are put into an order that N:M likes, before anything of it is pruned.

It is looked at as it is: for how loud its inputs are one pass of the calibration windows, where a method asks for that at
all. What the block computes stays the same, which is measured on the first batch; a matrix that does not fold keeps its
order and is named.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmsparse.calibration.inputs import Input, calibrate, learn_inputs
from llmsparse.calibration.passes import passes
from llmsparse.errors import NumericalError
from llmsparse.models.streamed import Activations, Block, Slot
from llmsparse.pruning.options import PruneOptions
from llmsparse.pruning.permutation.fold import Fold, patterned
from llmsparse.pruning.permutation.layout import Layout
from llmsparse.pruning.permutation.order import WORK, Order, better_order
from llmsparse.pruning.permutation.permuted import Permuted
from llmsparse.pruning.permutation.trial import allowed, difference, folding_layout
from llmsparse.pruning.selection import Choice
from llmsparse.runs.progress import Progress
from llmsparse.sparsity.patterns import NofM
from llmsparse.sparsity.stats import InputNorm, Statistic


@torch.no_grad()
def reorder_block(
    block: Block,
    acts: Activations,
    choices: Sequence[Choice],
    folds: Sequence[Fold],
    options: PruneOptions,
    progress: Progress,
) -> list[Permuted]:
    """Reorder what folds in `block.stored` and in the module; a row for each matrix that might have."""
    members = patterned(choices)
    folds = [fold for fold in folds if fold.into in members]
    if not folds:
        return []
    ranks = acts.share.ranks
    numbers = ranks.known(lambda: [folding_layout(block, acts, fold) for fold in folds])
    found = {fold.into: fold.layouts[number] for fold, number in zip(folds, numbers, strict=True) if number is not None}
    orders = _orders(block, acts, {name: members[name] for name in found}, found, options, progress)
    made = {name: one for name, one in orders.items() if any(order.after > order.before for order in one.values())}
    off = ranks.known(lambda: _applied(block, acts, folds, found, made)) if made else 0.0
    if made and not ranks.first:
        _apply(block, folds, found, made)
    rows: list[Permuted] = []
    for fold in folds:
        name, inside = members[fold.into][0].weight.name, orders.get(fold.into)
        if inside is None:
            rows.append(Permuted(name, folds=False))
        else:
            before, after = (_mean(inside, what) for what in ("before", "after"))
            rows.append(Permuted(name, True, before, after, off if fold.into in made else 0.0))
    return rows


Orders = dict[tuple[int, int], Order]  # (expert, piece) → its order; expert 0 where there are none


def _mean(orders: Orders, what: str) -> float:
    return sum(getattr(order, what) for order in orders.values()) / len(orders)


def _orders(
    block: Block,
    acts: Activations,
    members: Mapping[str, list[Choice]],
    layouts: Mapping[str, Layout],
    options: PruneOptions,
    progress: Progress,
) -> dict[str, Orders]:
    """Parameter → the orders of its pieces."""
    chosen: dict[Slot, list[Choice]] = {}
    for choice in (choice for inside in members.values() for choice in inside):
        chosen.setdefault(choice.weight.slot, []).append(choice)
    weights = [choice.weight for inside in chosen.values() for choice in inside]
    share = WORK / max(1, len(chosen))

    def needs(entry: Input) -> type[Statistic] | None:
        looks = any(choice.pruner.needs for slot in entry.slots for choice in chosen[slot])
        return InputNorm if looks else None

    def search(entry: Input) -> list[tuple[Slot, int, Order]]:
        return [
            (slot, piece, order)
            for slot in entry.slots
            for piece, order in enumerate(
                _search(block, chosen[slot], layouts[slot[0]], entry.statistic, share, options)
            )
        ]

    found: dict[str, Orders] = {name: {} for name in members}
    inputs = learn_inputs(block, acts, weights)
    looked = any(needs(entry) for entry in inputs)
    for group in passes(inputs, needs, options.statistics_budget, share=acts.share):
        if looked:
            advance = progress.batches(f"looking at {block.name}", len(acts.hidden))
            calibrate(block, acts, group, needs, device=options.device, seed=options.seed, advance=advance, sampled=1)
        for made in acts.share.ranks.divided(group, [entry.owner for entry in group], search):
            for (name, expert), piece, order in made:
                found[name][expert or 0, piece] = order
        for entry in group:
            entry.forget()
    return found


def _search(
    block: Block,
    choices: Sequence[Choice],
    layout: Layout,
    statistic: Statistic | None,
    work: float,
    options: PruneOptions,
) -> list[Order]:
    """The order of every piece of a matrix, by the energy that is kept: w² or, where its inputs were seen often enough,
    (w ‖x‖)²."""
    score = torch.cat([block.view(choice.weight).to(options.device, torch.float32).square() for choice in choices])
    if isinstance(statistic, InputNorm) and statistic.tokens >= InputNorm.least_tokens(statistic.width):
        score = score * statistic.norm.to(score.device).square()
    pattern = choices[0].pattern
    assert isinstance(pattern, NofM)
    pieces = (layout.score_of(piece, score) for piece in range(layout.pieces))
    found = [better_order(one, pattern.n, pattern.m, work / layout.pieces) for one in pieces]
    return [Order(order.channels.cpu(), order.before, order.after) for order in found]


def _applied(
    block: Block,
    acts: Activations,
    folds: Sequence[Fold],
    layouts: Mapping[str, Layout],
    orders: Mapping[str, Orders],
) -> float:
    """Reorder the block; how far its output in the first batch is off."""
    wanted = block.call(acts, 0).clone()
    _apply(block, folds, layouts, orders)
    off = difference(block.call(acts, 0), wanted)
    if not off <= allowed(wanted.dtype):
        raise NumericalError(
            f"{block.name}: with its inputs reordered its output is off by {off:g}, more than rounding explains; use --permute off"
        )
    return off


def _apply(block: Block, folds: Sequence[Fold], layouts: Mapping[str, Layout], orders: Mapping[str, Orders]) -> None:
    for fold in folds:
        if fold.into in orders:
            layout, inside = layouts[fold.into], orders[fold.into]
            channels: list[list[Tensor]] = [
                [_channels(inside, expert, piece, layout) for piece in range(layout.pieces)]
                for expert in range(fold.experts or 1)
            ]
            parameters = block.in_module({key: block.stored[key] for key in fold.keys})
            made = block.on_disk(parameters | layout.reordered(parameters, channels))
            block.stored.update({key: tensor.contiguous() for key, tensor in made.items()})
    block.reload({key for fold in folds for key in fold.keys})


def _channels(orders: Orders, expert: int, piece: int, layout: Layout) -> Tensor:
    """The order of a piece; as it was for an expert that keeps another pattern, or none."""
    order = orders.get((expert, piece))
    return torch.arange(layout.length) if order is None else order.channels
