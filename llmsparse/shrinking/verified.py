"""Whether tensors of these names and shapes are all that a config.json asks for, and nothing else: told before they are made.

A router wider than the experts that are there does not crash, it goes wrong: so shapes are held against each other one
by one, as transformers will load them.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmsparse.errors import CheckpointError
from llmsparse.models.empty_model import quiet
from llmsparse.models.naming import Naming
from llmsparse.models.new_config import empty_model


class _Spec(NamedTuple):
    shape: tuple[int, ...]


class _Planned:
    """Tensors that are not written yet, as `check_complete` reads a checkpoint."""

    def __init__(self, folder: Path, specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.folder = folder
        self._specs = specs

    def spec(self, key: str) -> _Spec:
        return _Spec(self._specs[key][0])


def check_made(
    config: Any,
    raw: dict[str, Any],
    specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    folder: Path,
    trust_remote_code: bool,
) -> None:
    """CheckpointError where a model of `raw`, a config.json of the kind of `config`, would not load from `specs`."""
    from llmsparse.models.complete import check_complete

    model = empty_model(config, raw, trust_remote_code)
    with quiet():
        naming = Naming(model, specs)
    check_complete(model, naming, _Planned(folder, specs))  # pyright: ignore[reportArgumentType]
    wanted = model.state_dict()
    for name, group in naming.groups.items():
        shape = specs[group.keys[0]][0]
        if group.converter is None and shape != tuple(wanted[name].shape):
            raise CheckpointError(
                f"{folder}: {group.keys[0]} would have shape {list(shape)}, the smaller model asks for "
                f"{list(wanted[name].shape)}; this model cannot be shrunk so"
            )
