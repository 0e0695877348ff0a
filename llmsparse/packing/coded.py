"""A checkpoint whose weights have become small integers, written as a packed folder in the format "nested".

How long a stream is shows when it is written, and shards are laid out before they are filled: so streams are written into a
folder beside, one file for the weights of a group, and copied from there.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmsparse.formats import PackedTensor, stored_bytes
from llmsparse.models.naming import Group, Naming
from llmsparse.packing.pack import Packable, Selection
from llmsparse.packing.report import PackedSize
from llmsparse.runs.progress import Progress
from llmsparse.storage.checkpoint import CheckpointReader, CheckpointWriter
from llmsparse.storage.heap import release_freed


@dataclass(frozen=True)
class Encoded:
    """What a group of tensors on disk has become: module tensor → as it is stored, or as it is."""

    weights: dict[str, PackedTensor]
    dense: dict[str, Tensor]
    transposed: Mapping[str, bool]  # of the weights: the module lays them out (in, out)


@dataclass(frozen=True, kw_only=True)
class CodedSelection(Selection):
    """What will be written, with the streams in files beside it."""

    of: CheckpointReader
    files: dict[str, Path]  # first module tensor of a group → folder of its streams

    @property
    def source(self) -> CheckpointReader:
        return self.of

    def packed(self, part: Packable) -> dict[str, Tensor]:
        reader = CheckpointReader(self.files[part.group.target])
        return reader.read(reader.keys())


def encode_groups(
    reader: CheckpointReader,
    source: CheckpointReader,
    naming: Naming,
    groups: Iterable[tuple[Group, tuple[str, ...]]],
    encode: Callable[[Group], Encoded],
    beside: Path,
    progress: Progress,
) -> CodedSelection:
    """Encode each group of tensors of `reader`, with what else on disk it uses up, into the folder `beside`. `source` is what
    `unpack` shall give back."""
    packables: list[Packable] = []
    weights: list[PackedSize] = []
    files: dict[str, Path] = {}
    groups = list(groups)
    progress.start(len(groups))
    for number, (group, used) in enumerate(groups):
        progress.block(group.target)
        encoded = encode(group)
        layers: dict[str, dict[str, Any]] = {}
        tensors = dict(encoded.dense)
        for name, weight in encoded.weights.items():
            layers[name] = weight.describe() | ({"transposed": True} if encoded.transposed.get(name) else {})
            tensors |= {name + suffix: tensor.contiguous() for suffix, tensor in weight.tensors().items()}
            weights.append(_size(name, layers[name], weight))
        files[group.target] = beside / str(number)
        files[group.target].mkdir(parents=True, exist_ok=True)
        specs = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        writer = CheckpointWriter(files[group.target], specs, 2**62)
        writer.write(tensors)
        writer.finish()
        plain = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in encoded.dense.items()}
        packables.append(Packable(group, layers, plain, used))
        release_freed()
    return CodedSelection(reader.folder, reader, naming, packables, weights, [], of=source, files=files)


def _size(name: str, described: Mapping[str, Any], weight: PackedTensor) -> PackedSize:
    shape, size = weight.shape, stored_bytes(described)
    numel = max(1, math.prod(shape))
    dtype, zeros = described["dtype"], 1 - weight.nnz / numel
    dense = numel * weight.dtype.itemsize
    return PackedSize(
        name.removesuffix(".weight"), shape, dtype, weight.pattern, zeros, size, dense, bits=8 * size / numel
    )
