"""Which field of a config.json says how many routed experts there are: the one that changes that, and nothing else, when it
is changed. Asked of transformers by building the model; names only say what is tried first."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError

from llmsparse.errors import CheckpointError
from llmsparse.models.new_config import Shapes, module_shapes, text_part
from llmsparse.shrinking.reduction import Source

COUNT = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
GROUPS = ("n_group", "num_expert_group")
GROUPS_ACTIVE = ("topk_group", "num_limited_groups")
REFUSALS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    IndexError,
    AssertionError,
    StrictDataclassError,
)


class Count(NamedTuple):
    """How a model with fewer experts is asked for."""

    fields: dict[str, Any]  # of what describes the language model in config.json, with their new values
    shapes: Shapes  # of what transformers builds then


def with_experts(source: Source, experts: int, kept: int, parameters: Iterable[str]) -> Count:
    """The change of config.json after which each of `parameters`, names in the model, holds `kept` of `experts` experts.

    CheckpointError where no field does that and nothing else.
    """
    config, old, wanted = source.model.config, source.model.shapes, set(parameters)
    for fields in _candidates(config.get_text_config(decoder=True), text_part(config, source.raw), experts, kept):
        raw = deepcopy(source.raw)
        text_part(config, raw).update(fields)
        try:
            new = module_shapes(config, raw, source.trust_remote_code)
        except REFUSALS:  # whatever a config makes of a number that it does not expect
            continue
        differing = {name for name, shape in old.items() if new.get(name) != shape}
        fewer = all(name in new and _fewer(old[name], new[name], experts, kept) for name in differing)
        if fewer and wanted <= differing and new.keys() == old.keys():
            return Count(fields, new)
    raise CheckpointError(
        f"{source.where}: no field of config.json says how many experts there are ({experts} in a block), so "
        f"{config.model_type} cannot be had with {kept}"
    )


def _fewer(old: tuple[int, ...], new: tuple[int, ...], experts: int, kept: int) -> bool:
    pairs = [(one, other) for one, other in zip(old, new, strict=False) if one != other]
    return len(old) == len(new) and pairs == [(experts, kept)]


def _candidates(config: Any, raw: dict[str, Any], experts: int, kept: int) -> Iterator[dict[str, Any]]:
    """Changes to try: all known names that are there, then each field of this value, then one that is not spelled out."""

    def changed(value: Any) -> Any:
        if value == experts and not isinstance(value, bool):
            return kept
        return (
            [kept] * len(value)
            if isinstance(value, list) and value and set(map(str, value)) == {str(experts)}
            else None
        )

    there = {key: new for key, value in raw.items() if (new := changed(value)) is not None}
    aliases = getattr(config, "attribute_map", {})
    known = {name for pair in aliases.items() if set(pair) & set(COUNT) for name in pair} | set(COUNT)
    if named := {key: value for key, value in there.items() if key in known}:
        yield named
    yield from ({key: value} for key, value in there.items())
    for name in sorted(known, key=lambda name: (name in aliases, name)):
        if name not in raw and changed(getattr(config, name, None)) is not None:
            yield {name: changed(getattr(config, name))}


def number(config: Any, names: Iterable[str], default: int) -> int:
    """The first of these fields that a config has; of a list the largest."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list) and value:
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default
