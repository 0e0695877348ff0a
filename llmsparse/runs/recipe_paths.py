"""Paths in recipe files, which are read from anywhere and shown to anybody.

Read: a path in a recipe file is looked for beside that file. `./x` and `../x` always are; a bare name is where it exists
there, and else what it would be on the command line: a hub id, a dataset, a path from the current folder.
Written: beside a result, paths that were given relative lead from the result's folder, unless they would name a home.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEYS = ("model", "teacher", "calibration", "text")  # of what is read; `output` is what is written
NAMES = ("builtin", "c4", "wikitext2")


def from_file(data: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What a recipe file says, with its paths as they are from the current folder."""
    read = {key: _found(value, file.parent) if key in KEYS else value for key, value in data.items()}
    output = read.get("output")
    return read | ({"output": os.path.expanduser(output)} if isinstance(output, str) else {})


def for_file(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same for a recipe that is written into `folder`."""
    return {key: _led(value, folder) if key in KEYS else value for key, value in data.items()}


def _found(value: Any, folder: Path) -> Any:
    if not _may_be_relative(value):
        return value
    kind, path = _parts(value)
    there = folder / path
    if path.split("/")[0] in (".", "..") or os.path.exists(there):
        return kind + os.path.relpath(os.path.realpath(there))
    return value


def _led(value: Any, folder: Path) -> Any:
    if not _may_be_relative(value):
        return value
    kind, path = _parts(value)
    if not os.path.exists(path):
        return value
    there, start, home = os.path.realpath(path), os.path.realpath(folder), str(Path.home())
    if os.path.commonpath([there, start]) == "/" or (_inside(there, home) and not _inside(start, home)):
        return kind + there  # the way there would go through the root, or name a home
    led = os.path.relpath(there, start)
    return kind + (led if led.startswith(".") else f"./{led}")


def _parts(value: str) -> tuple[str, str]:
    """("wikitext2:", FILE) of a text that says what a file is a copy of."""
    kind, colon, path = value.partition(":")
    return (f"{kind}:", path) if colon and kind in NAMES else ("", value)


def _may_be_relative(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", *NAMES) and not _parts(value)[1].startswith(("/", "~"))


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
