"""Give a packed checkpoint its zeros back: the checkpoint that was packed, every tensor and config.json to the bit.

Opens what `llmsparse pack` wrote, what `save_pretrained` made of it (whose tensors keep the module's names), and the
two sparse formats of compressed-tensors that nothing else opens any more. Streams, one tensor or stack of experts at a
time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.formats import compressed_tensors, format_of
from llmsparse.models.empty_model import build_empty, quiet
from llmsparse.models.naming import Naming
from llmsparse.models.origin import copy_side_files, fetch_model, is_packed, load_config, read_config
from llmsparse.packing.folder import RECORD, PackedCheckpoint
from llmsparse.packing.pack import REPLACED, Spec, write_text
from llmsparse.packing.report import compared
from llmsparse.runs.partial import PartialOutput, check_output
from llmsparse.runs.progress import Progress, Silent
from llmsparse.storage.checkpoint import CheckpointReader, CheckpointWriter
from llmsparse.storage.disk import parse_size
from llmsparse.storage.heap import release_freed
from llmsparse.storage.home_folder import expand_home

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Unpacking:
    """The outcome of `unpack`."""

    model: str
    output: str
    format: str  # that was read
    weights: int  # unpacked
    bytes: int  # of all tensors, as they were stored
    dense_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_row("[bold]output", Text(self.output))
        table.add_row("[bold]unpacked", f"{self.weights} weights, from {self.format}")
        table.add_row("[bold]whole checkpoint", compared(self.bytes, self.dense_bytes))
        return table


def unpack(
    model: str,
    output: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Unpacking:
    """Unpack `model` (folder or hub id) into the new folder `output`.

    Raises CheckpointError for a checkpoint that is not packed, is damaged, or is of a later format version; RecipeError
    and MachineError for an output that cannot be. A run that fails leaves nothing behind.
    """
    progress = progress or Silent()
    folder, shard_bytes = fetch_model(model, revision), parse_size(max_shard_size, "--max-shard-size")
    config, out = read_config(folder), expand_home(output, RecipeError)
    orphaned = compressed_tensors.format_of(config)
    if is_packed(config):
        packed = PackedCheckpoint(folder)
        reader, weights = packed.reader, len(packed.layers)
        what = f"llmsparse {' and '.join(sorted({format_of(one).FORMAT for one in packed.layers.values()}))}"

        def write(target: Path) -> CheckpointWriter:
            return _write_packed(packed, target, shard_bytes, trust_remote_code, progress)

    elif orphaned:
        plain = compressed_tensors.without_blocks(config)
        reader = CheckpointReader(folder)
        weights, what = len(compressed_tensors.find(reader.keys())), f"compressed-tensors {orphaned}"

        def write(target: Path) -> CheckpointWriter:
            return _write_orphaned(reader, plain, target, shard_bytes, progress)

    else:
        raise CheckpointError(f"{folder}: dense already: its config.json names no format that has to be unpacked")
    check_output(out, resume=False, overwrite=overwrite, source=folder)
    with (
        progress,
        PartialOutput(
            out, source=folder, fingerprint={"unpack": str(folder)}, resume=False, overwrite=overwrite, resumable=False
        ) as partial,
    ):
        writer = write(partial.folder)
        writer.finish()
        partial.publish()
    return Unpacking(str(model), str(output), what, weights, _total(reader), _total(writer))


def _write_packed(
    packed: PackedCheckpoint, target: Path, shard_bytes: int, trust_remote_code: bool, progress: Progress
) -> CheckpointWriter:
    copy_side_files(packed.folder, target, leaving=(*REPLACED, RECORD))
    if packed.record is not None:
        files, specs = packed.record.files, packed.record.specs()
        if "config.json" not in files:
            raise CheckpointError(
                f"{packed.folder / RECORD}: does not hold the config.json of what was packed; pack it again"
            )
    else:
        config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
        files = {"config.json": json.dumps(config, indent=2) + "\n"}
        specs = {key: packed.module_spec(key) for key in [*packed.plain_keys, *packed.layers]}
    for name in REPLACED:
        if name in files:
            write_text(target / name, files[name])
    naming = _naming(target, specs, trust_remote_code)
    known = {name for group in naming.groups.values() for name in group.targets}
    strange = sorted(packed.layers.keys() - known)
    if strange:
        raise CheckpointError(
            f"{packed.folder}: this transformers has no tensor {strange[0]!r} in the model; "
            f"unpack it with the versions it was packed with{_versions(packed)}"
        )
    writer = CheckpointWriter(target, specs, shard_bytes)
    writer.copy(packed.reader, naming.unknown)
    progress.start(len(naming.groups))
    for group in naming.groups.values():
        progress.block(group.target)
        if not packed.layers.keys() & set(group.targets):
            writer.copy(packed.reader, group.keys)
            continue
        writer.write(naming.to_disk({name: packed.module_tensor(name) for name in group.targets}))
        release_freed()
    if packed.record is not None:
        packed.verify_files(packed.record)  # a value whose bit flipped is as good a value to the format
    return writer


def _write_orphaned(
    reader: CheckpointReader, config: dict[str, Any], target: Path, shard_bytes: int, progress: Progress
) -> CheckpointWriter:
    weights = compressed_tensors.find(reader.keys())
    parts = {key: name for name, held in weights.items() for key in held.values()}
    specs: dict[str, Spec] = {}
    for key in reader.keys():
        name = parts.get(key, key)
        if name not in weights:
            specs[key] = (reader.spec(key).shape, reader.spec(key).dtype)
        elif name not in specs:
            stored = weights[name]["shape"]
            shape = compressed_tensors.shape_of(name, reader.read([stored])[stored])
            specs[name] = (shape, reader.spec(weights[name]["compressed"]).dtype)
    copy_side_files(reader.folder, target, leaving=("config.json",))
    write_text(target / "config.json", json.dumps(config, indent=2) + "\n")
    writer = CheckpointWriter(target, specs, shard_bytes)
    writer.copy(reader, [key for key in reader.keys() if key not in parts])
    progress.start(len(weights))
    for name, held in weights.items():
        progress.block(name)
        tensors = reader.read(held.values())
        dense = compressed_tensors.decode(
            f"{reader.folder}: {name}", {part: tensors[key] for part, key in held.items()}
        )
        writer.write({name: dense})
        release_freed()
    return writer


def _naming(folder: Path, keys: dict[str, Spec], trust_remote_code: bool) -> Naming:
    """Names on disk against those of the module that the config in `folder` describes."""
    config: Any = load_config(folder, trust_remote_code)
    with quiet():
        model = build_empty(config, torch.device("cpu"), torch.float32, trust_remote_code)
    return Naming(model, keys)


def _versions(packed: PackedCheckpoint) -> str:
    versions = packed.record.versions if packed.record else {}
    return f" ({', '.join(f'{name} {version}' for name, version in versions.items())})" if versions else ""


def _total(file: CheckpointReader | CheckpointWriter) -> int:
    return sum(spec.end - spec.begin for spec in map(file.spec, file.keys()))
