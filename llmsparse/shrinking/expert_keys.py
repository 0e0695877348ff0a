"""Which on-disk tensors of a block know how many experts there are, and how each is cut.

Learned by comparing what transformers builds from the old config and from the new one: a parameter with another number of
experts along one axis is cut along it, routers and their biases as well as experts. On disk it may be one tensor, cut
along the same axis, or one tensor for each expert, some of which go while the others are numbered anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.models.naming import Group
from llmsparse.models.new_config import Shapes
from llmsparse.models.streamed import StreamedModel
from llmsparse.shrinking.reduction import Specs
from llmsparse.storage.checkpoint import CheckpointReader


class Along(NamedTuple):
    """A tensor that holds something of every expert along an axis."""

    axis: int


class Alone(NamedTuple):
    """A tensor of one expert; `name` has {} for its number."""

    expert: int
    name: str


Op = Along | Alone
Ops = dict[str, Op]  # on-disk key → how it is cut; what is in none stays


def expert_keys(model: StreamedModel, reader: CheckpointReader, index: int, shapes: Shapes, experts: int) -> Ops:
    """How the tensors of block `index` are cut for a model whose parameters have `shapes`; {} for a block without experts.

    CheckpointError for a tensor of another layout than these, and for one that holds numbers of experts.
    """
    prefix = model.block_names[index] + "."
    ops: Ops = {}
    for group in model.naming.groups.values():
        if not group.target.startswith(prefix):
            continue
        axes = {name: axis for name in group.targets if (axis := _axis(model.shapes[name], shapes[name])) is not None}
        if axes:
            name, axis = next(iter(axes.items()))
            ops |= _cut_group(reader, group, model.shapes[name], axis, experts)
    for key in model.block_keys(index) if ops else ():
        dtype = reader.spec(key).dtype
        if not dtype.is_floating_point and dtype not in (torch.bool, torch.uint8):
            raise CheckpointError(
                f"{reader.folder}: {key} holds whole numbers, perhaps of experts, which cannot be cut"
            )
    return ops


def _axis(old: Sequence[int], new: Sequence[int]) -> int | None:
    """The one axis along which two shapes differ, None where they are the same."""
    return next((axis for axis, (one, other) in enumerate(zip(old, new, strict=True)) if one != other), None)


def _cut_group(reader: CheckpointReader, group: Group, shape: tuple[int, ...], axis: int, experts: int) -> Ops:
    by_pattern: dict[str, list[str]] = {}
    for key, pattern in group.sources:
        by_pattern.setdefault(pattern, []).append(key)
    ops: Ops = {}
    for keys in by_pattern.values():
        on_disk = reader.spec(keys[0]).shape
        if len(keys) == experts and experts > 1 and len(on_disk) < len(shape):
            ops |= {key: Alone(group.position(key), _numbered(keys, key)) for key in keys}
            continue
        along = axis
        if len(on_disk) == len(shape) == 2 and group.transposes(on_disk, shape):
            along = 1 - axis
        if len(keys) != 1 or len(on_disk) != len(shape) or on_disk[along] != experts:
            raise CheckpointError(
                f"{reader.folder}: {keys[0]} has shape {list(on_disk)}, wanted {experts} experts along axis {along}; "
                "experts stored like this cannot be taken out"
            )
        ops[keys[0]] = Along(along)
    return ops


def _numbered(keys: Sequence[str], key: str) -> str:
    """`key` with {} in the place where `keys` have the numbers of their experts."""
    parts = [one.split(".") for one in keys]
    places = [place for place in range(len(parts[0])) if len({one[place] for one in parts}) == len(keys)]
    own = key.replace("{", "{{").replace("}", "}}").split(".")
    own[places[0]] = "{}"
    return ".".join(own)


def beside(model: StreamedModel, ops: Mapping[str, Op], template: Sequence[str]) -> list[Ops]:
    """How tensors are cut that the model has no place for, yet are laid out like those of a block: blocks for multi-token
    prediction, which transformers passes over. One for each such block. `ops` are those of a block with keys `template`."""
    prefix = block_prefix(template)
    known = {key.removeprefix(prefix): op for key, op in ops.items()}
    found: dict[str, Ops] = {}
    for key in model.naming.unknown:
        for start in (place + 1 for place, letter in enumerate(key) if letter == "."):
            op = known.get(key[start:])
            if op is not None:
                there = op if isinstance(op, Along) else Alone(op.expert, key[:start] + op.name.removeprefix(prefix))
                found.setdefault(key[:start], {})[key] = there
                break
    return list(found.values())


def block_prefix(keys: Sequence[str]) -> str:
    """What the on-disk keys of a block begin with: "model.layers.3."."""
    parts = [key.split(".") for key in (min(keys), max(keys))]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(*parts, strict=False))
    return "".join(f"{part}." for part, _ in same)


def cut_specs(ops: Mapping[str, Op], specs: Specs, kept: int) -> Specs:
    """Names and shapes of what is left of `specs` with `kept` experts."""
    found: Specs = {}
    for key, (shape, dtype) in specs.items():
        op = ops.get(key)
        if isinstance(op, Along):
            found[key] = ((*shape[: op.axis], kept, *shape[op.axis + 1 :]), dtype)
        elif op is None:
            found[key] = (shape, dtype)
        elif op.expert < kept:
            found[op.name.format(op.expert)] = (shape, dtype)
    return found


def cut_tensors(ops: Mapping[str, Op], tensors: Mapping[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """What is left of `tensors` with the experts `kept`, numbered in their order."""
    number = {expert: place for place, expert in enumerate(kept)}
    chosen = torch.tensor(list(kept), dtype=torch.int64)
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        op = ops.get(key)
        if isinstance(op, Along):
            found[key] = tensor.index_select(op.axis, chosen)
        elif op is None:
            found[key] = tensor
        elif op.expert in number:
            found[op.name.format(number[op.expert])] = tensor
    return found


def expert_sizes(ops: Mapping[str, Op], tensors: Mapping[str, Tensor], experts: int) -> Tensor:
    """Norm of all weights of each expert, routers' rows aside: (experts,) float64."""
    squares = torch.zeros(experts, dtype=torch.float64)
    for key, op in ops.items():
        tensor = tensors[key]
        if isinstance(op, Alone):
            squares[op.expert] += tensor.float().square().sum().double()
        elif tensor.dim() == 3 and op.axis == 0:
            squares += torch.stack([one.float().square().sum().double() for one in tensor])
    return squares.sqrt()
