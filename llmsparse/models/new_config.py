"""The config.json of a smaller model: the source's own, word for word, with a few numbers changed."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmsparse.models.empty_model import build_empty, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = dict[str, tuple[int, ...]]  # of every parameter and buffer of a model, by name


@dataclass(frozen=True)
class NewConfig:
    """A config.json to be written."""

    raw: dict[str, Any]

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(self.raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def text_part(config: Any, raw: dict[str, Any]) -> dict[str, Any]:
    """The mapping in `raw`, the config.json of `config`, that describes the language model: all of it, or a part of a model
    that wraps one. To be changed in place."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return raw
    for key, value in raw.items():
        inner: Any = getattr(config, key, None)
        if (
            isinstance(value, dict)
            and hasattr(inner, "get_text_config")
            and inner.get_text_config(decoder=True) is text
        ):
            return text_part(inner, value)
    return raw


def empty_model(config: Any, raw: dict[str, Any], trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that transformers builds from `raw`, a config.json of the kind of `config`, without its weights."""
    other = type(config).from_dict(deepcopy(raw))  # which takes things out of what it is given
    other.name_or_path = config.name_or_path
    with quiet():
        return build_empty(other, torch.device("cpu"), torch.float32, trust_remote_code)


def module_shapes(config: Any, raw: dict[str, Any], trust_remote_code: bool = False) -> Shapes:
    """What transformers builds from a config.json of the kind of `config`, as far as shapes go."""
    model = empty_model(config, raw, trust_remote_code)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
