"""What a block's parameters become with other numbers in config.json."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from llmsparse.errors import CheckpointError, one_line
from llmsparse.models.empty_model import find_blocks
from llmsparse.models.meta_run import run_on_meta
from llmsparse.models.naming import in_block
from llmsparse.models.new_config import empty_model, module_shapes
from llmsparse.shrinking.narrowing import Axis, Shape, UnfitError, shorter_axes
from llmsparse.shrinking.reduction import Source

BROKEN = (
    StrictDataclassError,
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    ZeroDivisionError,
)


def narrower_blocks(source: Source, fields: Mapping[str, Any]) -> list[list[Axis]]:
    """Of each block the axes that get shorter with these fields. UnfitError where the config cannot be so, or where more
    changes than blocks."""
    try:
        after = module_shapes(source.model.config, source.raw | dict(fields), source.trust_remote_code)
    except BROKEN as error:
        raise UnfitError(one_line(error.__cause__ or error)) from error
    path = source.model.blocks_path
    count = len(source.model.block_names)
    found: list[list[Axis]] = [[] for _ in range(count)]
    for axis in shorter_axes(source.model.shapes, after):
        index = in_block(axis.name, path)
        if index is None:
            raise UnfitError(f"{axis.name}, outside the blocks, changes too")
        found[index].append(Axis(axis.name.removeprefix(f"{path}.{index}."), axis.dim, axis.before, axis.after))
    if not any(found):
        raise UnfitError("no matrix gets narrower with it")
    return found


def check_runs(source: Source, fields: Mapping[str, Any]) -> None:
    """UnfitError where the model with these fields can be built, but does not run."""
    model = empty_model(source.model.config, source.raw | dict(fields), source.trust_remote_code)
    try:
        run_on_meta(model, find_blocks(model)[1], torch.device("cpu"))
    except CheckpointError as error:
        changed = ", ".join(f"{name} {value}" for name, value in fields.items())
        raise UnfitError(f"with {changed} its matrices do not fit each other") from error


def block_shapes(source: Source, index: int) -> dict[str, Shape]:
    """Parameter inside a block → its shape."""
    prefix = source.model.block_names[index] + "."
    return {name.removeprefix(prefix): shape for name, shape in source.model.shapes.items() if name.startswith(prefix)}


def config_field(source: Source, name: str) -> str:
    """What config.json calls a field: gpt2 says n_head for num_attention_heads."""
    return source.model.config.attribute_map.get(name, name)
