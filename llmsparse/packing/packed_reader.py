"""A packed checkpoint, read as if it were not: tensors of the module, unpacked as they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from llmsparse.packing.folder import PackedCheckpoint
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.shard import TensorSpec


class PackedReader(CheckpointReader):
    """Names, shapes and dtypes are those of the module's tensors. Raises CheckpointError as `PackedCheckpoint`."""

    packed = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._checkpoint = PackedCheckpoint(folder)
        held = self._specs
        self._specs = {key: held[key] for key in self._checkpoint.plain_keys}
        for name in self._checkpoint.layers:
            shape, dtype = self._checkpoint.module_spec(name)
            self._specs[name] = TensorSpec(shape, dtype, held[name].file, 0, math.prod(shape) * dtype.itemsize)

    def is_stored(self, key: str) -> bool:
        return key not in self._checkpoint.layers

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: self._checkpoint.module_tensor(key) for key in keys}
