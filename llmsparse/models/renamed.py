"""Tensors of a checkpoint under other names than it has them, or one of them under two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from llmsparse.storage.checkpoint import CheckpointReader


class RenamedReader(CheckpointReader):
    """Some tensors of a checkpoint under other names: `names`, here → there."""

    def __init__(self, source: CheckpointReader, names: Mapping[str, str]) -> None:
        self.folder = source.folder
        self._source, self._names = source, dict(names)
        self._specs = {name: source.spec(there) for name, there in names.items()}

    def is_stored(self, key: str) -> bool:
        return self._source.is_stored(self._names[key])

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: self._source.read([self._names[key]])[self._names[key]] for key in keys}

    def fingerprint(self) -> dict[str, Any]:
        return self._source.fingerprint()
