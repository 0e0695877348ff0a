"""Checksums of what was written, so that what is read later can be held against it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from llmsparse.errors import MachineError
from llmsparse.storage.checkpoint import CHUNK_BYTES, CheckpointReader, CheckpointWriter
from llmsparse.storage.shard import TensorSpec, bytes_of, read_into


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, as they are stored."""
    return {key: hashlib.sha256(bytes_of(tensor.detach().cpu())).hexdigest() for key, tensor in tensors.items()}


def check_stored(checkpoint: CheckpointReader | CheckpointWriter, expected: Mapping[str, str]) -> None:
    """MachineError where what is stored is not what `expected` has the checksum of. Takes a part of a tensor at a time."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for key, checksum in expected.items():
        spec, digest = checkpoint.spec(key), hashlib.sha256()
        for offset in range(0, spec.end - spec.begin, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, spec.end - spec.begin - offset)]
            read_into(spec, offset, chunk)
            digest.update(chunk)
        if digest.hexdigest() != checksum:
            raise _other_bytes(spec, key)


def read_checked(checkpoint: CheckpointReader | CheckpointWriter, expected: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that `expected` has checksums of; MachineError for one that is not what was written."""
    tensors = checkpoint.read(expected)
    for key, checksum in checksums(tensors).items():
        if checksum != expected[key]:
            raise _other_bytes(checkpoint.spec(key), key)
    return tensors


def _other_bytes(spec: TensorSpec, key: str) -> MachineError:
    return MachineError(
        f"{spec.file}: {key} does not read back as it was written; check the disk, then start anew with --overwrite"
    )
