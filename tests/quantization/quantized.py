"""What quantizing tiny models is asked for, and what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmsparse.formats.nested import Nested
from llmsparse.packing.folder import PackedCheckpoint

SMALL: dict[str, Any] = {"calibration": "builtin", "calibration_samples": 4, "seq_len": 32, "device": "cpu"}


def weights_of(folder: Path | str) -> dict[str, Nested]:
    packed = PackedCheckpoint(Path(folder))
    found = {name: packed.weight(name) for name in packed.layers}
    return {name: weight for name, weight in found.items() if isinstance(weight, Nested)}
