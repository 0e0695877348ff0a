"""Pack a checkpoint: every weight whose zeros make it worth it is stored without them.

Two passes over the weights, one tensor (or stack of experts) at a time: the first counts, since shards are laid out
before they are filled, the second packs and takes each weight apart again, back to the very tensors it was made of.
What is packed is what the module multiplies activations with: linear weights, experts, an untied head. Embeddings,
tied weights, norms and routers stay as they are, and so does a weight that would be larger packed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.formats import FORMATS, layout, stored_bytes
from llmsparse.formats.bitmask import BITS, Bitmask, describe_unpacked
from llmsparse.models.naming import Group, Naming
from llmsparse.models.origin import copy_side_files, fetch_model, is_packed, read_config
from llmsparse.models.streamed import StreamedModel
from llmsparse.packing.folder import RECORD, PackedCheckpoint, Record, quantization_config, sha256
from llmsparse.packing.report import PackedSize, Packing
from llmsparse.runs.partial import PartialOutput, check_output
from llmsparse.runs.progress import Progress, Silent
from llmsparse.storage.checkpoint import CheckpointReader, CheckpointWriter
from llmsparse.storage.disk import disk_error, parse_size
from llmsparse.storage.heap import release_freed
from llmsparse.storage.home_folder import expand_home
from llmsparse.storage.pickled import open_stored
from llmsparse.storage.shard import DTYPE_NAMES
from llmsparse.version import __version__

Spec = tuple[tuple[int, ...], torch.dtype]
REPLACED = ("config.json", "README.md")  # files of the source that a packed folder has in a version of its own


def pack(
    model: str,
    output: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    drop_negative_zeros: bool = False,
    progress: Progress | None = None,
) -> Packing:
    """Pack `model` (folder or hub id) into the new folder `output`; `unpack` gives it back bit for bit, or with
    `drop_negative_zeros` with 0.0 where a packed weight held -0.0, which `w * mask` leaves in pruned places.

    Raises CheckpointError for a checkpoint that is packed already or has no weight that gains by it, RecipeError and
    MachineError for an output that cannot be. A run that fails leaves nothing behind.
    """
    progress = progress or Silent()
    folder, shard_bytes = fetch_model(model, revision), parse_size(max_shard_size, "--max-shard-size")
    if is_packed(read_config(folder)):
        raise CheckpointError(f"{folder}: already packed, by llmsparse; `llmsparse unpack` makes it dense again")
    out = expand_home(output, RecipeError)
    check_output(out, resume=False, overwrite=overwrite, source=folder)
    with progress:
        selection = select_packable(folder, trust_remote_code, progress, drop_negative_zeros)
        with PartialOutput(
            out, source=folder, fingerprint={"pack": str(folder)}, resume=False, overwrite=overwrite, resumable=False
        ) as partial:
            name = Path(model).resolve().name if Path(model).exists() else model
            packing = selection.write(partial.folder, shard_bytes, progress, model=name, output=str(output))
            partial.publish()
    return packing


@dataclass(frozen=True)
class Packable:
    """Tensors on disk that are stored as the module's, at least one of these packed."""

    group: Group
    layers: dict[str, dict[str, Any]]  # module tensor → what the config will say of it
    dense: dict[str, Spec]  # the others that the group fills
    beside: tuple[str, ...] = ()  # tensors on disk that are used up besides those of the group


@dataclass(frozen=True)
class Selection:
    """What will be packed, measured."""

    folder: Path
    reader: CheckpointReader
    naming: Naming
    packables: list[Packable]
    weights: list[PackedSize]
    left_dense: list[PackedSize]
    drops_negative_zeros: bool = False

    @property
    def source(self) -> CheckpointReader:
        """Whose names, shapes and dtypes `unpack` gives back."""
        return self.reader

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        return {name: described for part in self.packables for name, described in part.layers.items()}

    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of all tensors that will be stored, each group where its first tensor stood."""
        owner = {key: part for part in self.packables for key in part.group.keys}
        used = {key for part in self.packables for key in part.beside}
        specs: dict[str, Spec] = {}
        for key in self.reader.keys():
            part = owner.get(key)
            if key in used:
                continue
            if part is None:
                spec = self.reader.spec(key)
                specs[key] = (spec.shape, spec.dtype)
                continue
            specs |= part.dense
            for name, described in part.layers.items():
                specs |= {name + suffix: spec for suffix, spec in layout(described).items()}
        return specs

    def write(self, target: Path, shard_bytes: int, progress: Progress, *, model: str, output: str) -> Packing:
        """Write the packed checkpoint into the folder `target`, side files included."""
        writer = CheckpointWriter(target, self.specs(), shard_bytes)
        packed_keys = {key for part in self.packables for key in (*part.group.keys, *part.beside)}
        writer.copy(self.reader, [key for key in self.reader.keys() if key not in packed_keys])
        progress.start(len(self.packables))
        for part in self.packables:
            progress.block(part.group.target)
            writer.write(self.packed(part))
            release_freed()
        writer.finish()
        sizes = [sum(spec.end - spec.begin for spec in map(file.spec, file.keys())) for file in (writer, self.source)]
        dropped = self.drops_negative_zeros
        packing = Packing(model, output, self.weights, self.left_dense, sizes[0], sizes[1], dropped)
        self._write_side_files(target, packing, {writer.spec(key).file for key in writer.keys()})
        return packing

    def packed(self, part: Packable) -> dict[str, Tensor]:
        """The tensors to store, after they have been taken apart again and compared with those they were made of."""
        on_disk = self.reader.read(part.group.keys)
        if self.drops_negative_zeros:
            on_disk = {key: _positive_zeros(tensor) for key, tensor in on_disk.items()}
        stored: dict[str, Tensor] = {}
        back: dict[str, Tensor] = {}
        for name, tensor in self.naming.to_module(on_disk):
            described = part.layers.get(name)
            if described is None:
                stored[name] = back[name] = tensor
                continue
            packed = Bitmask.pack(outputs_first(tensor, described), described["pattern"])
            stored |= {name + suffix: stored_part for suffix, stored_part in packed.tensors().items()}
            back[name] = outputs_first(packed.unpack(), described)
        restored = self.naming.to_disk(back)
        for key, tensor in on_disk.items():
            if not torch.equal(_bytes(tensor), _bytes(restored[key])):
                raise CheckpointError(
                    f"{self.folder}: {key} would not come back from {part.group.target} bit for bit; "
                    f"transformers {transformers.__version__} converts it with a loss"
                )
        return stored

    def _write_side_files(self, target: Path, packing: Packing, files: set[Path]) -> None:
        copy_side_files(self.folder, target, leaving=(*REPLACED, RECORD))
        present = [self.folder / name for name in REPLACED if (self.folder / name).is_file()]
        replaced = {path.name: path.read_bytes().decode("utf-8", "surrogateescape") for path in present}
        config = read_config(self.folder) | {"quantization_config": quantization_config(self.layers)}
        record = Record(
            versions={"llmsparse": __version__, "transformers": transformers.__version__},
            checksums={file.name: sha256(file) for file in sorted(files)},
            files=replaced,
            tensors={
                key: {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape)}
                for key in self.source.keys()
                for spec in [self.source.spec(key)]
            },
        )
        texts = {
            "config.json": json.dumps(config, indent=2) + "\n",
            "README.md": packing.card(replaced.get("README.md", "")),
            RECORD: json.dumps(record.to_json(), indent=1) + "\n",
        }
        for name, text in texts.items():
            write_text(target / name, text)
        PackedCheckpoint(target)  # what was written must be what a reader wants


def select_packable(
    folder: Path, trust_remote_code: bool, progress: Progress, drop_negative_zeros: bool = False
) -> Selection:
    """Measure every weight that could be packed. CheckpointError where none would become smaller."""
    reader = open_stored(folder)
    model = StreamedModel(reader, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=trust_remote_code)
    packables: list[Packable] = []
    footprints: list[PackedSize] = []
    groups = list(model.matrices())
    progress.start(len(groups))
    for group, transposed in groups:
        progress.block(group.target)
        if len({reader.spec(key).dtype for key in group.keys}) > 1:
            continue  # fused they would have one
        layers: dict[str, dict[str, Any]] = {}
        dense: dict[str, Spec] = {}
        for name, tensor in model.naming.to_module(reader.read(group.keys)):
            dense[name] = (tuple(tensor.shape), tensor.dtype)
            if not can_be_packed(model.naming, reader, name, tensor):
                continue
            described = {"transposed": True} if transposed.get(name) else {}
            stored = _positive_zeros(tensor) if drop_negative_zeros else tensor
            described = describe_unpacked(outputs_first(stored, described)) | described
            footprint = _footprint(name, described, tensor)
            footprints.append(footprint)
            if footprint.pays:
                layers[name] = described
                del dense[name]
        if layers:
            packables.append(Packable(group, layers, dense))
        release_freed()
    weights = [footprint for footprint in footprints if footprint.pays]
    if not weights:
        sparsest = max(footprints, key=lambda footprint: footprint.sparsity, default=None)
        found = f"its sparsest weight, {sparsest.name}, has {sparsest.sparsity:.1%} zeros" if sparsest else "no weights"
        if sparsest and sparsest.negative_zeros:
            found += f", and {sparsest.negative_zeros:,} places of -0.0, which are kept without --drop-negative-zeros"
        raise CheckpointError(
            f"{folder}: a dense checkpoint, nothing in it would become smaller ({found}); prune it first"
        )
    left_dense = [footprint for footprint in footprints if not footprint.pays]
    return Selection(folder, reader, model.naming, packables, weights, left_dense, drop_negative_zeros)


def write_text(file: Path, text: str) -> None:
    """Write a text to the byte as it was read with `surrogateescape`."""
    try:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise disk_error(file, error, len(text)) from error


def can_be_packed(naming: Naming, reader: CheckpointReader, name: str, tensor: Tensor) -> bool:
    """A linear weight or a stack of experts, whose names are free and left alone by transformers when it loads them."""
    matrix = tensor.dim() == 3 or (tensor.dim() == 2 and name.endswith(".weight"))
    suffixes = [name + suffix for kind in FORMATS.values() for suffix in kind.SUFFIXES]
    return matrix and not set(suffixes).difference((name,)).intersection(reader) and all(map(naming.is_own, suffixes))


def outputs_first(tensor: Tensor, described: Mapping[str, Any]) -> Tensor:
    """(..., out, in) of a module tensor, and back."""
    return tensor.mT if described.get("transposed") else tensor


def _footprint(name: str, described: Mapping[str, Any], tensor: Tensor) -> PackedSize:
    shape, nnz = tuple(described["shape"]), described["nnz"]
    sparsity = 1 - nnz / max(1, tensor.numel())
    return PackedSize(
        name.removesuffix(".weight"),
        shape,
        described["dtype"],
        described["pattern"],
        sparsity,
        stored_bytes(described),
        tensor.nbytes,
        _negative_zeros(tensor),
    )


def _negative_zeros(tensor: Tensor) -> int:
    return int(torch.count_nonzero(_is_negative_zero(tensor))) if tensor.is_floating_point() else 0


def _positive_zeros(tensor: Tensor) -> Tensor:
    """The same, to the bit, but for 0.0 in the place of -0.0."""
    return tensor.masked_fill(_is_negative_zero(tensor), 0) if tensor.is_floating_point() else tensor


def _is_negative_zero(tensor: Tensor) -> Tensor:
    kind = BITS[tensor.element_size()]
    sign = 128 if kind == torch.uint8 else torch.iinfo(kind).min  # the sign bit alone
    return tensor.view(kind) == sign


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
