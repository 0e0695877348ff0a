"""The demo's text: the source of Python's own standard library, which every machine that runs Python has.

The embedded model (`demo/train.py`) has read every module but the held-out ones below, so calibrating and evaluating
on these needs no download and leaks nothing; what it has read is there to be trained on again. The text is that of the
*running* Python: figures measured under different Python versions differ a little, which is why `describe` names the
version. Imports no torch.
"""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from llmsparse.errors import MachineError

Part = Literal["training", "calibration", "evaluation"]

# Paths below the standard library, present with much the same content in Python 3.11, 3.12 and 3.13.
CALIBRATION: tuple[str, ...] = (
    "argparse.py",
    "asyncio/tasks.py",
    "dataclasses.py",
    "email/message.py",
    "http/client.py",
    "json/encoder.py",
    "logging/handlers.py",
    "shutil.py",
    "tempfile.py",
)
EVALUATION: tuple[str, ...] = (
    "asyncio/streams.py",
    "cmd.py",
    "concurrent/futures/thread.py",
    "contextlib.py",
    "csv.py",
    "email/header.py",
    "graphlib.py",
    "html/parser.py",
    "json/decoder.py",
    "queue.py",
    "shelve.py",
    "socketserver.py",
    "textwrap.py",
    "unittest/loader.py",
)

_HELD_OUT: dict[str, tuple[str, ...]] = {"calibration": CALIBRATION, "evaluation": EVALUATION}

_NOT_SOURCE = ("__phello__", "dist-packages", "encodings", "ensurepip", "pydoc_data", "site-packages", "turtledemo")
_SKIPPED_FOLDERS = frozenset((*_NOT_SOURCE, "idle_test", "test", "tests"))
_GENERATED = frozenset(("html/entities.py", "keyword.py", "locale.py", "stringprep.py", "token.py"))


def describe(part: Part) -> str:
    """One line for reports, such as "standard library of Python 3.11.7, 14 held-out modules (evaluation)"."""
    count = f"{len(_modules(part))} {'modules' if part == 'training' else 'held-out modules'}"
    return f"standard library of Python {platform.python_version()}, {count} ({part})"


def texts(part: Part) -> Iterator[str]:
    """The held-out modules in the order listed above, or every other hand-written one, ordered by path.

    Raises MachineError for a Python without its source.
    """
    root = _stdlib()
    for module in _modules(part):
        if not (root / module).is_file():
            raise MachineError(
                f"builtin: {root} lacks {module}, so this Python comes without its source; use a .txt or .jsonl file"
            )
        yield (root / module).read_text(encoding="utf-8")


def _modules(part: Part) -> Sequence[str]:
    return _HELD_OUT[part] if part in _HELD_OUT else sorted(_training_modules(_stdlib()))


def _training_modules(root: Path) -> list[str]:
    modules = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    return [module for module in modules if _is_training(module)]


def _is_training(module: str) -> bool:
    if module in CALIBRATION or module in EVALUATION or module in _GENERATED:
        return False
    *folders, name = module.split("/")
    built_for_this_machine = name.startswith("_sysconfigdata") or any(f.startswith("config-") for f in folders)
    return not built_for_this_machine and _SKIPPED_FOLDERS.isdisjoint(folders)


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
