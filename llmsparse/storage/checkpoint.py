"""Safetensors checkpoints as a stream: tensors read one by one, and written in place at offsets planned from headers.

Memory is the tensors asked for and nothing else; nothing stays mapped. What lies inside one file is `shard.py`'s
business, here shards become a checkpoint. Pickled weights (`.bin`) are `pickled.py`'s.
"""

# pyright: reportUnknownVariableType=false
from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.storage.disk import disk_error, fsync, replace_file, reserve, write_all
from llmsparse.storage.index import INDEX, SINGLE, weight_map_of
from llmsparse.storage.shard import PLAIN, Header, TensorSpec, bytes_of, lay_out, read_header, read_into

CHUNK_BYTES = 8 << 20
Planned = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name → shape, dtype


class CheckpointReader:
    """A checkpoint folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Only headers are read here, and held against the index and the files' sizes: a missing, truncated or corrupt shard
    is a CheckpointError before any work is done. `config.json` is not looked at. `absent` are headers, by name, of
    shards that are not there yet: enough for a plan, not to read a tensor.
    """

    packed: ClassVar[bool] = False  # weights are packed by llmsparse on disk, and unpacked as they are read

    def __init__(self, folder: Path, absent: Mapping[str, Header] | None = None) -> None:
        self.folder = Path(folder)
        absent = absent or {}
        weight_map = weight_map_of(self.folder, absent)
        self._headers: list[Header] = []
        self._specs: dict[str, TensorSpec] = {}
        for file in sorted({self.folder / name for name in weight_map.values()}) or [self.folder / SINGLE]:
            header = absent.get(file.name) or read_header(file)
            self._headers.append(header)
            for key, spec in header.specs.items():
                if weight_map.get(key, file.name) != file.name:
                    continue  # the index says that another shard holds the one that counts
                if key in self._specs:
                    raise CheckpointError(f"{file}: tensor {key!r} is also in {self._specs[key].file.name}")
                self._specs[key] = spec
        for key, name in weight_map.items():
            if key not in self._specs:
                raise CheckpointError(
                    f"{self.folder / INDEX}: names tensor {key!r} in {name}, which does not hold it; "
                    "download the checkpoint again"
                )

    def keys(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self._specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def spec(self, key: str) -> TensorSpec:
        """Shape, dtype and place of one tensor."""
        if key not in self._specs:
            raise CheckpointError(f"{self.folder}: holds no tensor {key!r}")
        return self._specs[key]

    def is_stored(self, key: str) -> bool:
        """Whether the bytes on disk are those of the tensor, so that they can be copied."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.end - spec.begin for spec in self._specs.values())

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on CPU, in memory of their own."""
        return {key: read_tensor(self.spec(key)) for key in keys}

    def fingerprint(self) -> dict[str, Any]:
        """Per shard: size, modification time and hash of the header; changes when the checkpoint does."""
        return {
            header.file.name: {
                "size": header.size,
                "mtime_ns": header.mtime_ns,
                "header_sha256": hashlib.sha256(header.text).hexdigest(),
            }
            for header in self._headers
        }


class CheckpointWriter:
    """Shards of known layout in `folder`, filled in place and in any order.

    Shards are planned as `save_pretrained` plans them: greedy in the order of `specs` (name -> shape, dtype), at most
    `max_shard_bytes` of tensors each, a larger tensor alone. All files get their full size, header and index here, so
    a full disk shows at once (MachineError). A file that is already there with the same header and size keeps its
    contents: a resumed run goes on where the last one stopped. `resuming` says that these hold finished work, so that
    one that is missing or differs is a CheckpointError.
    """

    def __init__(
        self,
        folder: Path,
        specs: Planned,
        max_shard_bytes: int,
        *,
        resuming: bool = False,
        metadata: Mapping[str, str] = PLAIN,
    ) -> None:
        from huggingface_hub import split_state_dict_into_shards_factory

        self.folder = Path(folder)
        split = split_state_dict_into_shards_factory(
            dict(specs),
            get_storage_size=_nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_bytes,
        )
        self._specs: dict[str, TensorSpec] = {}
        self._touched: set[Path] = set()
        headers: dict[Path, bytes] = {}
        for name, keys in (split.filename_to_tensors or {SINGLE: []}).items():
            file = self.folder / name
            headers[file], placed = lay_out(file, {key: specs[key] for key in keys}, metadata)
            self._specs |= placed
        self._index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        self._sharded = len(headers) > 1
        self._create(headers, resuming)

    def keys(self) -> list[str]:
        """Names of all tensors, shard by shard."""
        return list(self._specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def spec(self, key: str) -> TensorSpec:
        """Shape, dtype and place of one tensor."""
        if key not in self._specs:
            raise CheckpointError(f"{self.folder}: no place was planned for tensor {key!r}")
        return self._specs[key]

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Each tensor to its place. Shape and dtype must be as planned."""
        for key, tensor in tensors.items():
            spec = self.spec(key)
            _check_same(key, spec, tuple(tensor.shape), tensor.dtype)
            self._put(spec, 0, bytes_of(tensor.detach().cpu()))

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """What was written before, by this run or by the one it resumes."""
        return {key: read_tensor(self.spec(key)) for key in keys}

    def copy(
        self, reader: CheckpointReader, keys: Iterable[str], *, named: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The named tensors byte for byte from another checkpoint, `CHUNK_BYTES` at a time whatever their size; `named`
        says which have another name there. Returns the SHA-256 of each."""
        buffer, sums = memoryview(bytearray(CHUNK_BYTES)), dict[str, str]()
        for key in keys:
            name, digest = (named or {}).get(key, key), hashlib.sha256()
            if not reader.is_stored(name):
                tensor = reader.read([name])[name]
                self.write({key: tensor})
                sums[key] = hashlib.sha256(bytes_of(tensor)).hexdigest()
                continue
            source, target = reader.spec(name), self.spec(key)
            _check_same(key, target, source.shape, source.dtype)
            for offset in range(0, source.end - source.begin, CHUNK_BYTES):
                chunk = buffer[: min(CHUNK_BYTES, source.end - source.begin - offset)]
                read_into(source, offset, chunk)
                digest.update(chunk)
                self._put(target, offset, chunk)
            sums[key] = digest.hexdigest()
        return sums

    def sync(self) -> None:
        """Return when everything written so far would survive a power cut."""
        for path in [*sorted(self._touched), self.folder]:
            fsync(path)
        self._touched.clear()

    def finish(self) -> None:
        """The last call: index and shards are complete and safely on disk."""
        self._write_index()
        self.sync()

    def _put(self, spec: TensorSpec, offset: int, data: memoryview) -> None:
        self._touched.add(spec.file)
        try:
            descriptor = os.open(spec.file, os.O_WRONLY)
            try:
                write_all(descriptor, data, spec.begin + offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise disk_error(spec.file, error, len(data)) from error

    def _write_index(self) -> None:
        if self._sharded:
            replace_file(self.folder / INDEX, json.dumps(self._index, indent=2, sort_keys=True) + "\n")

    def _create(self, headers: Mapping[Path, bytes], resuming: bool) -> None:
        """Make every planned file that is not there yet; on failure remove those, so that no disk stays full."""
        sizes = {file: len(header) for file, header in headers.items()}
        for spec in self._specs.values():
            sizes[spec.file] = max(sizes[spec.file], spec.end)
        new: list[Path] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            new = [file for file, header in headers.items() if not _holds(file, header, sizes[file])]
            if new and resuming:
                raise CheckpointError(f"{new[0]}: lost or damaged since it was written; start anew with --overwrite")
            for file in new:
                file.unlink(missing_ok=True)
            volume = os.statvfs(self.folder)
            if volume.f_blocks and sum(sizes[file] for file in new) > volume.f_bavail * volume.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._write_index()
            for file in new:
                descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                try:
                    reserve(descriptor, sizes[file])
                    write_all(descriptor, headers[file], 0)
                finally:
                    os.close(descriptor)
        except OSError as error:
            for file in new:
                file.unlink(missing_ok=True)
            raise disk_error(self.folder, error, sum(sizes[file] for file in new)) from error
        self._touched |= set(new)


def read_tensor(spec: TensorSpec) -> Tensor:
    """A tensor from disk, in memory of its own."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    read_into(spec, 0, bytes_of(tensor))
    return tensor


def _nbytes(spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    return math.prod(spec[0]) * spec[1].itemsize


def _holds(file: Path, header: bytes, size: int) -> bool:
    """Whether the file is there already, as planned."""
    if not file.is_file() or file.stat().st_size != size:
        return False
    with file.open("rb") as stream:
        return stream.read(len(header)) == header


def _check_same(key: str, planned: TensorSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if (shape, dtype) != (planned.shape, planned.dtype):
        raise CheckpointError(
            f"{planned.file}: tensor {key!r}: got shape {list(shape)} {dtype}, planned {list(planned.shape)} {planned.dtype}; "
            "what is read does not belong together"
        )
