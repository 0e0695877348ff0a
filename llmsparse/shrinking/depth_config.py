"""The config of a model with fewer blocks: whatever it says layer by layer follows the blocks that are kept.

A list as long as the model is deep says something of every layer, a list of ascending numbers may name layers, a number
may say how many of the first ones are of a kind. Which of these a field is, the model itself decides: every kept block must
be what it was, in its classes, its sizes and its settings, and the first reading for which that is so is taken.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsparse.errors import CheckpointError
from llmsparse.models.variant import BlockOutline, field_name, outline, with_fields

DEPTH = "num_hidden_layers"


def depth_config(config: Any, kept: Sequence[int], trust_remote_code: bool = False) -> Any:
    """`config` for the blocks numbered `kept`, ascending. CheckpointError where the ones that are left would be others."""
    depth = len(outline_of := outline(config, trust_remote_code).blocks)
    wanted = [outline_of[index] for index in kept]
    fields: dict[str, Any] = {field_name(config, DEPTH): len(kept)}
    readings: dict[str, list[Any]] = {}
    for name, value in config.to_dict().items():
        if name not in fields and (found := _readings(name, value, kept, depth)):
            readings[name] = found
    fields |= {name: found[0] for name, found in readings.items() if isinstance(found[0], list)}

    best, least = _try(config, fields, wanted, trust_remote_code)
    for name, found in readings.items():
        for value in found:
            if not least:
                break
            if fields.get(name, config.to_dict()[name]) != value:
                tried, differing = _try(config, fields | {name: value}, wanted, trust_remote_code)
                if len(differing) < len(least):
                    fields, best, least = fields | {name: value}, tried, differing
    if least or best is None:
        raise CheckpointError(
            f"{config.model_type} cannot be made of the blocks {', '.join(map(str, kept))} alone: {least[0]}"
        )
    return best


def _readings(name: str, value: Any, kept: Sequence[int], depth: int) -> list[Any]:
    """What a field may become, the likeliest first; nothing where it says nothing of layers."""
    found: list[Any] = []
    if isinstance(value, list):
        if len(value) == depth and "token" not in name:
            found.append([value[index] for index in kept])
        numbers = all(type(item) is int and 0 <= item < depth for item in value)
        if value and numbers and sorted(set(value)) == value:
            found.append([kept.index(number) for number in value if number in kept])
    elif type(value) is int and 0 < value <= depth:
        found.append(sum(index < value for index in kept))
    return found


def _try(
    config: Any, fields: dict[str, Any], wanted: Sequence[BlockOutline], trust_remote_code: bool
) -> tuple[Any, list[str]]:
    """The config with these fields, and how its blocks differ from the wanted ones."""
    try:
        changed = with_fields(config, fields)
        made = outline(changed, trust_remote_code).blocks
    except CheckpointError as error:
        return None, [str(error)] * (len(wanted) + 1)
    if len(made) != len(wanted):
        return None, [f"{len(made)} blocks instead of {len(wanted)}"] * (len(wanted) + 1)
    found = [(index, _difference(one, other)) for index, (one, other) in enumerate(zip(made, wanted, strict=True))]
    return changed, [f"block {index} would be another one in {where}" for index, where in found if where]


def _difference(one: BlockOutline, other: BlockOutline) -> str | None:
    """The first thing in which two blocks differ."""
    for of_one, of_other in ((one.shapes, other.shapes), (one.settings, other.settings)):
        for name in of_one | of_other:
            if of_one.get(name) != of_other.get(name):
                return name
    return None
