"""Paths in recipe files, which are read from anywhere and shown to anybody.

Read: a path in a recipe file is looked for beside that file. `./x` and `../x` always are; a bare name is where it exists
there, and else what it would be on the command line: a hub id, a dataset, a path from the current folder.
Written: beside a result, paths that were given relative lead from the result's folder, unless they would name a home; and
text that the model wrote is the file that holds it there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmsparse.errors import CalibrationError
from llmsparse.text.kinds import KNOWN, SELF
from llmsparse.text.shares import split_share

KEYS = ("model", "teacher", "calibration", "text")  # of what is read; `output` is what is written
STORED = "calibration/self.safetensors"  # what the model wrote itself, inside a result
WEIGHTED = ("calibration",)  # of these, a text that may have a weight


def from_file(data: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What a recipe file says, with its paths as they are from the current folder."""
    read = {key: _changed(key, value, _found, file.parent) for key, value in data.items()}
    output = read.get("output")
    return read | ({"output": os.path.expanduser(output)} if isinstance(output, str) else {})


def for_file(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same for a recipe that is written into `folder`."""
    return {key: _changed(key, value, _led, folder) for key, value in data.items()}


def _changed(key: str, value: Any, change: Callable[[Any, Path], Any], folder: Path) -> Any:
    """A path of `key` changed, or each of a list, the weights of texts left as they are."""
    if key not in KEYS:
        return value
    if isinstance(value, list):
        return [_changed(key, one, change, folder) for one in value]  # pyright: ignore[reportUnknownVariableType]
    weight = _weight(value) if key in WEIGHTED else ""
    return change(value.removesuffix(weight), folder) + weight if weight else change(value, folder)


def _weight(value: Any) -> str:
    """`@2` of `notes.txt@2`; nothing where there is no weight that can be."""
    try:
        return value.removeprefix(split_share(value).source) if isinstance(value, str) else ""
    except CalibrationError:
        return ""


def _found(value: Any, folder: Path) -> Any:
    if not _may_be_relative(value):
        return value
    kind, path = _parts(value)
    there = folder / path
    if path.split("/")[0] in (".", "..") or os.path.exists(there):
        return kind + os.path.relpath(os.path.realpath(there))
    return value


def _led(value: Any, folder: Path) -> Any:
    if value == SELF:
        return f"./{STORED}"
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
    return (f"{kind}:", path) if colon and kind in KNOWN else ("", value)


def _may_be_relative(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", *KNOWN) and not _parts(value)[1].startswith(("/", "~"))


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
