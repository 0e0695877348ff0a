"""A checkpoint whose weights are encoded, read as if they were not."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.encodings import mxfp4, packed_integers, scaled
from llmsparse.encodings.protocol import Finder
from llmsparse.errors import CheckpointError
from llmsparse.storage.checkpoint import CheckpointReader, read_tensor
from llmsparse.storage.pickled import PickledReader, is_pickled
from llmsparse.storage.shard import Header, TensorSpec

FINDERS: dict[str, Finder] = {  # quant_method, and format where it has several
    "fp8": scaled.find,
    "mxfp4": mxfp4.find,
    "compressed-tensors float-quantized": scaled.find,
    "compressed-tensors int-quantized": scaled.find,
    "compressed-tensors naive-quantized": scaled.find,
    "compressed-tensors pack-quantized": packed_integers.find,
}
BLOCK = "quantization_config"


def encoding_of(config: Mapping[str, Any]) -> str | None:
    """The encoding that a model's config names, None where its weights are stored as they are or in an unknown way."""
    block = _block(config)
    method, kind = block.get("quant_method"), block.get("format")
    name = f"{method} {kind}" if method == "compressed-tensors" else method
    return name if isinstance(name, str) and name in FINDERS else None


def without_encoding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with its weights as they are."""
    plain = {key: value for key, value in config.items() if key != BLOCK}
    text = plain.get("text_config")
    return plain | {"text_config": without_encoding(text)} if isinstance(text, dict) else plain


def open_checkpoint(folder: Path, absent: Mapping[str, Header] | None = None) -> CheckpointReader:
    """The checkpoint in `folder`, decoded while it is read where its config says how it is encoded; pickled weights where
    there are no safetensors."""
    if not absent and is_pickled(Path(folder)):
        return PickledReader(folder)
    try:
        config: Any = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # said, better, by whoever reads the config
        config = None
    if isinstance(config, dict) and encoding_of(config) is not None:
        return DecodedReader(folder, absent, config)
    return CheckpointReader(folder, absent)


class DecodedReader(CheckpointReader):
    """A checkpoint in one of the encodings: names, shapes and dtypes are those of the weights, decoded as they are read.

    Memory for a weight is its parts, in fp32 once, and what is given back.
    """

    def __init__(self, folder: Path, absent: Mapping[str, Header] | None, config: Mapping[str, Any]) -> None:
        super().__init__(folder, absent)
        self.encoding = encoding_of(config)
        if self.encoding is None:
            raise CheckpointError(f"{folder}: its config names no encoding that is known")
        found = FINDERS[self.encoding](self._specs, _block(config))
        self._encoded, dtype = found.weights, _dtype(config)
        self._on_disk = self._specs
        first = {next(iter(encoded.parts.values())): name for name, encoded in self._encoded.items()}
        hidden = {part for encoded in self._encoded.values() for part in encoded.parts.values()} | found.dropped
        self._specs = {}
        for key, spec in self._on_disk.items():
            if (name := first.get(key)) is not None:
                shape = self._encoded[name].shape
                nbytes = math.prod(shape) * dtype.itemsize
                self._specs[name] = TensorSpec(shape, dtype, spec.file, 0, nbytes)
            elif key not in hidden:
                self._specs[key] = spec

    def is_stored(self, key: str) -> bool:
        return key not in self._encoded

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return dict(self._decoded(keys))

    def _decoded(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            encoded = self._encoded.get(key)
            if encoded is None:
                yield from super().read([key]).items()
                continue
            parts = {part: read_tensor(self._on_disk[name]) for part, name in encoded.parts.items()}
            yield key, encoded.decode(parts, self.spec(key).dtype)


def _block(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    block = config.get(BLOCK) or (text.get(BLOCK) if isinstance(text, dict) else None)
    return block if isinstance(block, dict) else {}


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """What the config says the model computes in; bfloat16 where it says nothing."""
    text: Any = config.get("text_config")
    for block in (config, text if isinstance(text, dict) else {}):
        named = block.get("dtype") or block.get("torch_dtype")
        if isinstance(named, str):
            dtype = getattr(torch, named.removeprefix("torch."), None)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
                return dtype
    return torch.bfloat16
