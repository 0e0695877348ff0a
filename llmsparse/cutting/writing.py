"""Thresholds in a checkpoint that has been copied: in its config.json, and beside it what stands for inputs left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from llmsparse.models.origin import is_packed, read_config
from llmsparse.models.thresholds import OWN, Thresholds
from llmsparse.packing.folder import RECORD, Record, sha256
from llmsparse.storage.disk import disk_error


def write_thresholds(folder: Path, thresholds: Thresholds) -> None:
    """Add them to the checkpoint in `folder`. Of a packed one the config that `unpack` gives back has them too."""
    thresholds.write_means(folder)
    config = read_config(folder)
    _write(folder / "config.json", _with(json.dumps(config), thresholds))
    record = Record.read(folder) if is_packed(config) else None
    if record is not None:
        sums = {name: sha256(folder / name) for name in _weight_files(folder)}
        files = record.files | {"config.json": _with(record.files["config.json"], thresholds)}
        made = replace(record, files=files, checksums=sums)
        _write(folder / RECORD, json.dumps(made.to_json(), indent=2, ensure_ascii=False) + "\n")


def _with(config: str, thresholds: Thresholds) -> str:
    content = json.loads(config)
    own = content.get(OWN)
    content[OWN] = (own if isinstance(own, dict) else {}) | thresholds.to_json()
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _weight_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_error(file, error, len(text)) from error
