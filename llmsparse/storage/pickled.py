"""Checkpoints of pickled weights (`pytorch_model.bin`), mapped and read tensor by tensor.

Only tensors are unpickled (`weights_only`), nothing in the file is run. Files are mapped: memory is the tensors asked for.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError, one_line
from llmsparse.storage.checkpoint import INDEX, SINGLE, CheckpointReader
from llmsparse.storage.shard import TensorSpec

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"


def is_pickled(folder: Path) -> bool:
    """Whether a folder holds pickled weights, and no safetensors, which come first."""
    names = {SINGLE, INDEX, PICKLED, PICKLED_INDEX}
    there = {name for name in names if (folder / name).is_file()}
    return bool(there) and not there & {SINGLE, INDEX}


def open_stored(folder: Path) -> CheckpointReader:
    """The checkpoint in a folder as it is stored, in safetensors or pickled."""
    return PickledReader(folder) if is_pickled(folder) else CheckpointReader(folder)


class PickledReader(CheckpointReader):
    """`pytorch_model.bin` or the shards of its index, by the names that safetensors would have.

    CheckpointError for files that are no such weights, or were written by torch before 1.6, which cannot be mapped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._files = _files(self.folder)
        self._tensors: dict[str, Tensor] = {}  # mapped
        self._specs: dict[str, TensorSpec] = {}
        for file in self._files:
            for key, tensor in _open(file).items():
                if key in self._specs:
                    raise CheckpointError(f"{file}: tensor {key!r} is also in {self._specs[key].file.name}")
                self._tensors[key] = tensor
                self._specs[key] = TensorSpec(tuple(tensor.shape), tensor.dtype, file, 0, tensor.nbytes)

    def is_stored(self, key: str) -> bool:
        return False

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        for key in (keys := list(keys)):
            self.spec(key)  # a name that is not there
        return {key: self._tensors[key].clone(memory_format=torch.contiguous_format) for key in keys}

    def fingerprint(self) -> dict[str, Any]:
        contents = json.dumps([(key, list(spec.shape), str(spec.dtype)) for key, spec in self._specs.items()])
        names = hashlib.sha256(contents.encode()).hexdigest()
        stats = {file.name: file.stat() for file in self._files}
        return {
            name: {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "header_sha256": names}
            for name, stat in stats.items()
        }


def _files(folder: Path) -> list[Path]:
    if (folder / PICKLED).is_file():
        return [folder / PICKLED]
    index = folder / PICKLED_INDEX
    try:
        names: set[str] = set(json.loads(index.read_bytes())["weight_map"].values())
        bare = all(Path(name).name == name for name in names)
        missing = sorted(name for name in names if not (folder / name).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a checkpoint index (no weight_map of names); download it again") from error
    if not bare or not names:
        raise CheckpointError(f"{index}: weight_map is empty or names files outside of its folder")
    if missing:
        raise CheckpointError(f"{index}: names shard {missing[0]}, which is missing; download the checkpoint again")
    return [folder / name for name in sorted(names)]


def _open(file: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as weights alone ({one_line(error)[:200]}); load it with software that you trust, "
            "and save_pretrained it as safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{file}: holds something else than tensors by name")
    for key, tensor in found.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = "no numbers" if tensor.device.type != "cpu" else f"a tensor of layout {tensor.layout}"
            raise CheckpointError(
                f"{file}: {key} is {kind}, wanted a dense tensor; save_pretrained the model as safetensors"
            )
    return {str(key): tensor.detach() for key, tensor in found.items()}
