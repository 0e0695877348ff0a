"""The config of a model with fewer blocks: whatever it says layer by layer follows the blocks that are kept.

A list as long as the model is deep says something of every layer, a list of ascending numbers may name layers, a number
may say how many of the first ones are of a kind. Which of these a field is, the model itself decides: every kept block must
be what it was, in its classes, its sizes and its settings, and the first reading for which that is so is taken.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from llmsparse.errors import CheckpointError, one_line
from llmsparse.models.empty_model import find_blocks
from llmsparse.models.new_config import empty_model
from llmsparse.shrinking.reduction import Source
from llmsparse.shrinking.shapes import BROKEN, config_field

DEPTH = "num_hidden_layers"
PLACE = "layer_idx"  # a block's number; its cache wants it, and nothing else

Outline = dict[str, Any]  # of a block: its parameters' shapes; each class, number, text and flag that its modules hold


def fields_for_blocks(source: Source, kept: Sequence[int]) -> dict[str, Any]:
    """The fields of config.json that are others when only the blocks numbered `kept`, ascending, are there.

    CheckpointError where what is left would be other blocks.
    """
    known: dict[str, Any] = source.model.config.to_dict()
    whole = _blocks(source, {})
    wanted = [whole[index] for index in kept]
    fields: dict[str, Any] = {config_field(source, DEPTH): len(kept)}
    readings = {name: _readings(name, value, kept, len(whole)) for name, value in known.items() if name not in fields}
    fields |= {name: found[0] for name, found in readings.items() if found and isinstance(found[0], list)}

    least = _differences(source, fields, wanted)
    for name, value in ((name, value) for name, found in readings.items() for value in found):
        if least and fields.get(name, known[name]) != value:
            differing = _differences(source, fields | {name: value}, wanted)
            if len(differing) < len(least):
                fields, least = fields | {name: value}, differing
    if least:
        raise CheckpointError(
            f"{source.where}: {source.model.config.model_type} cannot be made of {len(kept)} of its {len(whole)} blocks: "
            f"{least[0]}"
        )
    return fields


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


def _differences(source: Source, fields: dict[str, Any], wanted: Sequence[Outline]) -> list[str]:
    """How the blocks of a model with these fields differ from the wanted ones; the more, the worse."""
    try:
        made = _blocks(source, fields)
    except (CheckpointError, *BROKEN) as error:
        return [one_line(error)] * (len(wanted) + 1)
    if len(made) != len(wanted):
        return [f"it has {len(made)} blocks then, not {len(wanted)}"] * (len(wanted) + 1)
    found: list[str] = []
    for index, (one, other) in enumerate(zip(made, wanted, strict=True)):
        where = next((name for name in one | other if one.get(name) != other.get(name)), None)
        if where is not None:
            found.append(f"block {index} would be another one, in {where}")
    return found


def _blocks(source: Source, fields: dict[str, Any]) -> list[Outline]:
    model = empty_model(source.model.config, source.raw | fields, source.trust_remote_code)
    return [_outline(block) for block in find_blocks(model)[1]]


def _outline(block: nn.Module) -> Outline:
    found: Outline = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    for path, module in block.named_modules():
        found[f"{path}."] = type(module).__name__
        for name, value in vars(module).items():
            plain = value is None or isinstance(value, bool | int | float | str)
            if plain and name not in (PLACE, "training") and not name.startswith("_"):
                found[f"{path}.{name}"] = value
    return found
