"""Names and tensors of a checkpoint against those of the module transformers builds from it.

Since transformers 5 the two may differ: prefixes come and go, experts are stored one by one and held as one tensor.
transformers knows the rules; here they are applied to any part of a checkpoint, of any dtype, in both directions.
Nothing here reads a tensor.

`transformers.conversion_mapping` and `transformers.core_model_loading` are importable but not documented as public;
what is used of them is the same from transformers 5.15 to 5.23.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from llmsparse.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MATRIX_NAMES = {"weight", "bias"}  # of a module that is one matrix: what owns it is the module around


@dataclass
class Group:
    """Tensors of the checkpoint that become module tensors together."""

    target: str  # the module tensor, or the first of them
    converter: WeightConverter | None  # None: one tensor under another name, or the same
    sources: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # (on-disk key, pattern it matched)

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self.sources]

    @property
    def targets(self) -> list[str]:
        """Names of all module tensors it fills."""
        if self.converter is None:
            return [self.target]
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]

    def position(self, key: str) -> int:
        """The place of `key` among the sources of its pattern: the number of the expert that it is."""
        return self._positions[key]

    @cached_property
    def _positions(self) -> dict[str, int]:
        """For all sources at once: there may be hundreds of experts. Asked for when the group is complete."""
        seen: Counter[str] = Counter()
        positions: dict[str, int] = {}
        for key, pattern in self.sources:
            positions[key] = seen[pattern]
            seen[pattern] += 1
        return positions

    def transposes(self, shape: tuple[int, ...], target_shape: tuple[int, ...]) -> bool:
        """Whether conversion swaps the last two dimensions of a tensor of this shape."""
        flips = 0
        for operation in self.converter.operations if self.converter else ():
            if isinstance(operation, Transpose):
                flips += not (operation.check_dims and shape == target_shape)
        return flips % 2 == 1


class Naming:
    """The two-way map between the keys of a checkpoint and the tensors of a model."""

    def __init__(self, model: PreTrainedModel, keys: Iterable[str]) -> None:
        mapping = get_model_conversion_mapping(model)
        self._model = model
        self._renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        self._names: dict[str, Any] = model.state_dict()
        self._places: dict[str, tuple[str, str | None]] = {}
        self.groups: dict[str, Group] = {}  # by first module tensor
        self.unknown: list[str] = []  # keys that the model has no tensor for

        by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        keys = list(keys)
        for key in sorted(keys, key=dot_natural_key):  # the order in which transformers stacks experts
            target, pattern = self._place(key)
            if target in self._names:
                converter = by_pattern[pattern] if pattern is not None else None
                group = self.groups.setdefault(target, Group(target, converter))
                group.sources.append((key, key if pattern is None else pattern))
        self._group_of = {key: group for group in self.groups.values() for key in group.keys}
        self.unknown = [key for key in keys if key not in self._group_of]
        used: Any = [rule for rule in mapping if rule.was_used()]
        model._weight_conversions = used  # what `revert_weight_conversion` reverts

    def target(self, key: str) -> str | None:
        """The module tensor that `key` goes into (the first, where it is split), or None."""
        group = self._group_of.get(key)
        return group.target if group else None

    def keys_of(self, names: Iterable[str]) -> list[str]:
        """On-disk keys of all that is read and written together with these module tensors."""
        wanted = set(names)
        return [key for group in self.groups.values() if not wanted.isdisjoint(group.targets) for key in group.keys]

    def is_own(self, name: str) -> bool:
        """Whether loading leaves `name` as it is, as it should a name of the module's."""
        return self._place(name)[0] == name

    def to_module(
        self, tensors: Mapping[str, Tensor], prepare: Callable[[str, Tensor], Tensor] = lambda target, tensor: tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """(module name, tensor) for on-disk tensors, which must hold all or none of each group's.

        `prepare(target, tensor)` is applied to each on-disk tensor first. One group at a time is converted.
        """
        for group in {id(group): group for group in (self._group_of[key] for key in tensors)}.values():
            absent = [key for key in group.keys if key not in tensors]
            if absent:
                raise CheckpointError(
                    f"{group.target} is made of {group.keys[0]} and of {absent[0]}, which lies in another part of the model; "
                    "such a checkpoint cannot be streamed"
                )
            if group.converter is None:
                yield group.target, prepare(group.target, tensors[group.keys[0]])
                continue
            converter: Any = deepcopy(group.converter)  # whose annotations know futures only
            for key, pattern in group.sources:
                converter.add_tensor(group.target, key, pattern, prepare(group.target, tensors[key]))
            converted: dict[str, Any] = converter.convert(group.target, model=self._model, config=self._model.config)
            for name, tensor in converted.items():
                yield name, tensor[0] if isinstance(tensor, list) else tensor

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On-disk tensors for module tensors: the reverse of `to_module`, for complete groups.

        transformers' reversal knows one canonical set of names, a checkpoint may use an older one: tensors that
        conversion puts into the same place, in the same order, are the same tensors.
        """
        reverted = revert_weight_conversion(self._model, dict(tensors))
        places: dict[tuple[str, str | None], list[str]] = {}
        for name in sorted(reverted, key=dot_natural_key):
            places.setdefault(self._place(name), []).append(name)
        result: dict[str, Tensor] = {}
        for (target, pattern), names in places.items():
            group = self.groups[target]
            keys = [key for key, matched in group.sources if pattern is None or matched == pattern]
            result.update((key, reverted[name]) for key, name in zip(keys, names, strict=True))
        return result

    def _place(self, key: str) -> tuple[str, str | None]:
        """(module tensor, converter pattern or None) of an on-disk key, as loading decides it."""
        if key not in self._places:
            prefix = self._model.base_model_prefix
            place = rename_source_key(key, self._renamings, self._converters, prefix, self._names)
            if place[0] not in self._names and key in self._names:
                place = rename_source_key(key, [], [], prefix, self._names)
            self._places[key] = place
        return self._places[key]


def find_embedding(model: PreTrainedModel, embedding: nn.Module | None, folder: Path) -> tuple[str, nn.Module]:
    """The name of the weight of an embedding or a head, and the module that has it."""
    for name, module in model.named_modules():
        if module is embedding:
            return f"{name}.weight", module
    raise CheckpointError(f"{folder}: {type(model).__name__} has no input or no output embedding")


def in_block(name: str, blocks: str) -> int | None:
    """The number of the block that a module tensor belongs to, `blocks` being the name of their list."""
    match = re.match(rf"{re.escape(blocks)}\.(\d+)\.", name)
    return int(match[1]) if match else None


def owner(name: str) -> str:
    """The module that a parameter is a part of: `mlp` for mlp.down_proj.weight, mlp.experts for mlp.experts.down_proj."""
    path = name.split(".")
    return ".".join(path[: -2 if path[-1] in MATRIX_NAMES else -1])
