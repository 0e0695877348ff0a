"""A packed checkpoint: what its config says of its weights, the weights, and what it was packed from.

Tensors have the names and shapes that they have in the module transformers builds. What does not follow from them lies
in `llmsparse_packed.json`: a checksum of every file, and all that is needed to give the source back as it was. A folder
without that file still loads and unpacks, under the module's names. docs/packed-format.md is the specification.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.formats import FIRST, FORMATS, PackedTensor, check_description, format_of, layout, restore, stored_bytes
from llmsparse.models.origin import PACKED, read_config
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.shard import DTYPES, TensorSpec

RECORD = "llmsparse_packed.json"
FORMAT_VERSION = max(kind.SINCE for kind in FORMATS.values())  # the highest that is read
# for who looks into a config.json that transformers calls an "unknown quantization type"
HINT = "pip install llmsparse, and import it before the model is loaded, or start the program with: llmsparse run -- PROGRAM"


def quantization_config(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The block that makes a `config.json` that of a packed checkpoint, of the lowest version that can say it."""
    version = format_version(layers)
    return {
        "quant_method": PACKED,
        "load_with": HINT,
        **({"format": FIRST} if version == 1 else {}),
        "format_version": version,
        "bit_order": "little",
        "layers": {name: dict(described) for name, described in layers.items()},
    }


def format_version(layers: Mapping[str, Mapping[str, Any]]) -> int:
    """The lowest version of the folder that can hold these weights."""
    return max((format_of(described).SINCE for described in layers.values()), default=1)


def read_layers(file: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Module tensor → its description, from the config in `file`. CheckpointError for one that cannot be understood,
    for lack of sense or because a later llmsparse wrote it."""
    block: Any = config.get("quantization_config")
    version = block.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: packed in format version {version}, this llmsparse reads up to {FORMAT_VERSION}; "
            "install a newer llmsparse"
        )
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{file}: quantization_config has format_version {version!r}, wanted 1 or more")
    fixed = {"bit_order": "little"} | ({"format": FIRST} if version == 1 else {})
    for key, wanted in fixed.items():
        if block.get(key) != wanted:
            raise CheckpointError(f"{file}: quantization_config has {key} {block.get(key)!r}, wanted {wanted!r}")
    layers: Any = block.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(described, dict) for described in layers.values()):
        raise CheckpointError(f"{file}: quantization_config has no layers, which describe the packed weights")
    for name, described in layers.items():
        check_description(f"{file}: {name}", described)
    needed = format_version(layers)
    if needed > version:
        raise CheckpointError(
            f"{file}: format_version {version} has no weights as are described, which {needed} brought"
        )
    return layers


def refuse_undescribed(file: Path, layers: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> None:
    """CheckpointError where the files hold a packed weight that the config in `file` does not speak of."""
    marks = dict(kind.MARK for kind in FORMATS.values())
    for key, spec in stored.items():
        suffix = next((suffix for suffix in marks if key.endswith(suffix)), "")
        name = key.removesuffix(suffix)
        if suffix and name in stored and name not in layers and spec.dtype == marks[suffix] and len(spec.shape) > 1:
            raise CheckpointError(
                f"{file}: quantization_config does not describe {name}, which is packed in {spec.file.name}; the two do "
                "not belong together, pack the checkpoint again"
            )


@dataclass(frozen=True)
class Record:
    """`llmsparse_packed.json`."""

    versions: dict[str, str]  # of what packed it
    checksums: dict[str, str]  # file of weights → sha256
    files: dict[str, str]  # the source's files that packing replaced, config.json among them → text
    tensors: dict[str, dict[str, Any]]  # the source's tensors, in order → {"dtype": as in safetensors, "shape"}

    def to_json(self) -> dict[str, Any]:
        """As of the first version, which it has not changed since."""
        return {"format_version": 1, **asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """The record in `folder`, None if there is none."""
        file = folder / RECORD
        if not file.is_file():
            return None
        try:
            content: Any = json.loads(file.read_bytes())
            record = cls(*({**content[key]} for key in ("versions", "checksums", "files", "tensors")))
            texts: list[Any] = [*record.checksums.values(), *record.files.values()]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("checksums and files are texts")
            record.specs()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: damaged; pack the checkpoint again") from error
        return record

    def specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the source's tensors, in its order."""
        return {key: (tuple(held["shape"]), DTYPES[held["dtype"]]) for key, held in self.tensors.items()}


class PackedCheckpoint:
    """A folder that `llmsparse pack` wrote, or `save_pretrained` of the model loaded from it.

    Headers are held against the config here; no tensor is read. Raises CheckpointError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.layers = read_layers(folder / "config.json", self.config)
        self.record = Record.read(folder)
        self.reader = CheckpointReader(folder)
        stored = {key: self.reader.spec(key) for key in self.reader.keys()}
        refuse_undescribed(folder / "config.json", self.layers, stored)
        self._packed_keys: set[str] = set()
        for name, described in self.layers.items():
            for suffix, wanted in layout(described).items():
                spec = self.reader.spec(name + suffix)
                if (spec.shape, spec.dtype) != wanted:
                    raise CheckpointError(
                        f"{spec.file}: {name + suffix} is {list(spec.shape)} {spec.dtype}, config.json wants "
                        f"{list(wanted[0])} {wanted[1]}; the two do not belong together, pack the checkpoint again"
                    )
                self._packed_keys.add(name + suffix)

    @property
    def plain_keys(self) -> list[str]:
        """Names of the tensors that are stored as they are."""
        return [key for key in self.reader.keys() if key not in self._packed_keys]

    def weight(self, name: str) -> PackedTensor:
        """A packed weight, its counts checked."""
        described = self.layers[name]
        tensors = self.reader.read(name + suffix for suffix in layout(described))
        parts = {key.removeprefix(name): tensor for key, tensor in tensors.items()}
        return restore(f"{self.folder}: {name}", described, parts)

    def module_tensor(self, name: str) -> Tensor:
        """A tensor as the module holds it, unpacked if it is packed."""
        if name not in self.layers:
            return self.reader.read([name])[name]
        weight = self.weight(name).unpack()
        return weight.mT.contiguous() if self.layers[name].get("transposed") else weight

    def module_spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of `module_tensor(name)`; reads nothing."""
        if name not in self.layers:
            spec = self.reader.spec(name)
            return spec.shape, spec.dtype
        described = self.layers[name]
        *experts, out, width = described["shape"]
        sizes = (width, out) if described.get("transposed") else (out, width)
        return (*experts, *sizes), getattr(torch, described["dtype"])

    def stored_bytes(self, name: str) -> int:
        """What a packed weight takes on disk."""
        return stored_bytes(self.layers[name])

    def verify(self) -> None:
        """Check every packed weight, then every file's checksum. CheckpointError naming the first that is not right."""
        for name in self.layers:
            self.weight(name)
        if self.record is None:
            raise CheckpointError(f"{self.folder}: has no {RECORD}, so no checksum to verify its files with")
        self.verify_files(self.record)

    def verify_files(self, record: Record) -> None:
        """Check every file's checksum. CheckpointError naming the first that is not right."""
        files = sorted({self.reader.spec(key).file.name for key in self.reader.keys()})
        for name in files:
            if sha256(self.folder / name) != record.checksums.get(name):
                raise CheckpointError(
                    f"{self.folder / name}: is not what was written: its sha256 is not the one in {RECORD}; "
                    "copy the file again, or pack the checkpoint again"
                )


def sha256(file: Path) -> str:
    """Checksum of a file."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
