"""Checksums of what was written, so that what is read later can be held against it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from llmsparse.errors import MachineError
from llmsparse.storage.checkpoint import CheckpointReader, CheckpointWriter
from llmsparse.storage.shard import bytes_of


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, as they are stored."""
    return {key: hashlib.sha256(bytes_of(tensor.detach().cpu())).hexdigest() for key, tensor in tensors.items()}


def read_checked(checkpoint: CheckpointReader | CheckpointWriter, expected: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that `expected` has checksums of; MachineError for one that is not what was written."""
    tensors = checkpoint.read(expected)
    for key, checksum in checksums(tensors).items():
        if checksum != expected[key]:
            raise MachineError(
                f"{checkpoint.spec(key).file}: {key} does not read back as it was written; "
                "check the disk, then start anew with --overwrite"
            )
    return tensors
