"""The demo's text: the source of Python's own standard library, which every machine that runs Python has.

The embedded model (`demo/train.py`) has read every module but the held-out ones below, so calibrating and evaluating
on these needs no download and leaks nothing. The text is that of the *running* Python: figures measured under
different Python versions differ a little, which is why `describe` names the version. Imports no torch.
"""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path
from typing import Literal

HeldOut = Literal["calibration", "evaluation"]

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

_MODULES: dict[str, tuple[str, ...]] = {"calibration": CALIBRATION, "evaluation": EVALUATION}

_NOT_SOURCE = ("__phello__", "dist-packages", "encodings", "ensurepip", "pydoc_data", "site-packages", "turtledemo")
_SKIPPED_FOLDERS = frozenset((*_NOT_SOURCE, "idle_test", "test", "tests"))
_GENERATED = frozenset(("html/entities.py", "keyword.py", "locale.py", "stringprep.py", "token.py"))


def describe(which: HeldOut) -> str:
    """One line for reports, such as "standard library of Python 3.11.7, 14 held-out modules (evaluation)"."""
    return f"standard library of Python {platform.python_version()}, {len(_MODULES[which])} held-out modules ({which})"


def texts(which: HeldOut) -> list[str]:
    """The held-out modules, one text each, in the order listed above."""
    root = _stdlib()
    for module in _MODULES[which]:
        if not (root / module).is_file():
            raise FileNotFoundError(f"{module}: not in the standard library at {root}; the demo text needs its source")
    return [_read(root / module) for module in _MODULES[which]]


def training_texts() -> list[str]:
    """Every other hand-written module of the standard library, ordered by path."""
    root = _stdlib()
    return [_read(root / module) for module in sorted(_training_modules(root))]


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


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
