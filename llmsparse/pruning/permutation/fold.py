"""Which matrices may take their inputs in another order, told from names and shapes: the last one of a module that others
of the same module compute the inputs of. Whether they do is tried out once the block is there.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmsparse.models.naming import owner
from llmsparse.models.streamed import HEAD, StreamedModel
from llmsparse.pruning.permutation.layout import Axis, Layout, Shape, layouts
from llmsparse.pruning.selection import Choice
from llmsparse.sparsity.patterns import NofM

NOWHERE = torch.empty(0, 0, 0, dtype=torch.int64)


@dataclass(frozen=True)
class Fold:
    """A matrix whose inputs may be reordered, or a parameter of several experts."""

    name: str  # on disk, of the first weight
    into: str  # the parameter, inside the block
    shape: Shape
    keys: tuple[str, ...]  # on disk, of all that may move
    layouts: tuple[Layout, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """Of one expert, or the one there is: how many numbers it gives and takes in."""
        width = self.layouts[0].into.size
        return self.shape[-2] * self.shape[-1] // width, width

    @property
    def experts(self) -> int | None:
        return self.shape[0] if len(self.shape) == 3 else None


def patterned(choices: Sequence[Choice]) -> dict[str, list[Choice]]:
    """Parameter inside the block → the choices of it, where these keep N of M."""
    found: dict[str, list[Choice]] = {}
    for choice in choices:
        if isinstance(choice.pattern, NofM):
            found.setdefault(choice.weight.slot[0], []).append(choice)
    return found


def folds_of(model: StreamedModel, choices: Mapping[str, list[Choice]]) -> dict[str, list[Fold]]:
    """Of every block the matrices with a pattern N:M that may take in their inputs in another order."""
    return {name: list(_in_block(model, index, choices[name])) for index, name in enumerate(model.block_names)}


def why_nothing_folds(choices: Mapping[str, list[Choice]]) -> str:
    """What stands against the first weight."""
    members = [choice for block, inside in choices.items() if block != HEAD for choice in inside]
    some = [choice for choice in members if isinstance(choice.pattern, NofM)]
    if not some:
        name = members[0].weight.name if members else "every weight"
        return f"{name} gets no pattern N:M, and so the order of its inputs says nothing; give --pattern 2:4, or leave it out"
    return (
        f"what enters {some[0].weight.name} is not computed by a matrix of the same module alone, and so its inputs keep their "
        f"order, as in all {len(some)} weights chosen; choose down_proj or o_proj too, or leave it out"
    )


def _in_block(model: StreamedModel, index: int, choices: Sequence[Choice]) -> Iterator[Fold]:
    prefix = model.block_names[index] + "."
    shapes = {name: tuple(one.shape) for name, one in model.module(index, "").named_parameters()}
    laid_out = {name.removeprefix(prefix): flag for name, flag in model.laid_out.items() if name.startswith(prefix)}
    last = {owner(name): name for name in laid_out}  # in call order
    for name, members in patterned(choices).items():
        shape, dim = shapes[name], -2 if laid_out[name] else -1
        if last.get(owner(name)) != name or members[0].weight.shape[0] != model.hidden_size:
            continue
        beside = {
            other: (one, -2 if laid_out.get(other) is False else -1)
            for other, one in shapes.items()
            if other != name and owner(other) == owner(name) and _goes_with(one, shape, other in laid_out)
        }
        heads, groups = _heads(model.config.get_text_config()) if len(shape) == 2 else (0, [])
        spans = [choice.pattern.span for choice in members]
        ways = [
            way
            for way in layouts(Axis(name, dim, shape[dim], NOWHERE), beside, heads, groups)
            if not any(way.length % span for span in spans)
        ]
        if ways:
            names = {prefix + axis.name for way in ways for axis in (way.into, *way.out)}
            yield Fold(members[0].weight.name, name, shape, tuple(model.naming.keys_of(names)), tuple(ways))


def _goes_with(shape: Shape, into: Shape, matrix: bool) -> bool:
    """Whether a parameter may compute the inputs of another: each expert for its own, and otherwise a matrix or a vector."""
    if len(into) == 3:
        return len(shape) in (2, 3) and shape[0] == into[0]
    return len(shape) == 1 or (len(shape) == 2 and matrix)


def _heads(config: Any) -> tuple[int, list[int]]:
    """How many query heads there are, and how many values they may share; 0 where the config says nothing."""
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if type(heads) is not int:
        return 0, []
    return heads, [groups, heads, 1] if type(groups) is int and groups else [heads, 1]
