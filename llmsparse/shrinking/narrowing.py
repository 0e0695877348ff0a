"""Which parameters of a block get narrower with a number in config.json, and which of their entries belong to what is cut.

Nothing is known of architectures: the model of the changed config shows which axis of which parameter became shorter. A
unit is the one matrix that takes channels (or heads) in, and all that computes them: it is cut piece by piece.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


class UnfitError(Exception):
    """A number in the config does not make a model narrower in a way that can be carried out; the message says why."""


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter that gets shorter."""

    name: str  # of the parameter, inside the block
    dim: int  # counted from the end
    before: int
    after: int
    layouts: tuple[tuple[int, ...], ...] = ()  # sizes of parts that stand one behind the other; which one is tried out

    def part_sizes(self, layout: int) -> tuple[int, ...]:
        """Of the layout of this number, or of the last one there is."""
        return self.layouts[min(layout, len(self.layouts) - 1)]


@dataclass(frozen=True)
class Unit:
    """Parameters that get narrower together."""

    into: Axis  # the input axis of the matrix that takes the pieces in
    out: tuple[Axis, ...]  # axes of all that computes them
    pieces: int  # equal parts that are kept or cut whole: channels, or key-value groups
    kept: int
    experts: int | None  # of parameters in three dimensions: each expert keeps pieces of its own

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (self.into, *self.out)

    @property
    def layouts(self) -> int:
        """How many ways there are in which its axes may be laid out."""
        return max(len(axis.layouts) for axis in self.axes)


def shorter_axes(before: Mapping[str, Shape], after: Mapping[str, Shape]) -> list[Axis]:
    """The axes of a block's parameters, or of a whole model's, that differ. UnfitError where one has become longer, or two of
    one parameter are others."""
    if before.keys() != after.keys():
        raise UnfitError(f"it is made of other parameters then: {min(before.keys() ^ after.keys())}")
    found: list[Axis] = []
    for name, shape in before.items():
        other = after[name]
        dims = [dim for dim in range(-len(shape), 0) if len(shape) == len(other) and shape[dim] != other[dim]]
        if shape != other and (len(dims) != 1 or other[dims[0]] > shape[dims[0]]):
            raise UnfitError(f"{name} is {list(other)} then, not {list(shape)}")
        found += [Axis(name, dim, shape[dim], other[dim]) for dim in dims]
    return found


def reader(axes: Sequence[Axis], shapes: Mapping[str, Shape], laid_out: Mapping[str, bool], width: int) -> Axis:
    """The one axis among them that is the input of a matrix with `width` outputs; UnfitError where there is another number of
    them. `laid_out`: matrix → laid out (in, out)."""
    inputs = [axis for axis in axes if axis.name in laid_out and axis.dim == (-2 if laid_out[axis.name] else -1)]
    if len(inputs) != 1:
        names = ", ".join(axis.name for axis in inputs) or "none"
        raise UnfitError(f"{len(inputs)} matrices take in what gets narrower ({names}), wanted 1")
    outputs = shapes[inputs[0].name][-1 if laid_out[inputs[0].name] else -2]
    if outputs != width:
        raise UnfitError(f"{inputs[0].name} gives {outputs} numbers, not the {width} of a hidden state")
    return inputs[0]


def positions(axis: Axis, layout: int, pieces: int, kept: Tensor) -> Tensor:
    """The entries of an axis that belong to the pieces of these numbers, in order. In every part of the layout, each piece is
    as long as the others, and they stand one behind the other."""
    found: list[Tensor] = []
    start = 0
    for size in axis.part_sizes(layout):
        length = size // pieces
        inside = torch.arange(length, device=kept.device)
        found.append((start + kept[:, None] * length + inside).flatten())
        start += size
    return torch.cat(found)


def cut_parameters(unit: Unit, layout: int, tensors: Mapping[str, Tensor], kept: Sequence[Tensor]) -> dict[str, Tensor]:
    """The parameters of a unit with the pieces that are kept, new tensors; `kept` are ascending numbers, for each expert
    its own where there are experts."""
    found: dict[str, Tensor] = {}
    for axis in unit.axes:
        tensor = tensors[axis.name]
        chosen = [positions(axis, layout, unit.pieces, one) for one in kept]
        if unit.experts is None:
            found[axis.name] = tensor.index_select(axis.dim, chosen[0])
        else:
            pairs = zip(tensor, chosen, strict=True)
            found[axis.name] = torch.stack([one.index_select(axis.dim, some) for one, some in pairs])
    return found
