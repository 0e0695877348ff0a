"""Writes that survive a power cut, and what to tell the user when the disk does not play along."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from pathlib import Path

from llmsparse.errors import MachineError, RecipeError

UNITS = (
    {"": 1, "B": 1}
    | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    | {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}
)


def disk_error(path: Path, error: OSError, needed: int = 0) -> MachineError:
    """One line for a failed write to `path`, which took `needed` bytes."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "disk full" if error.errno == errno.ENOSPC else "disk quota exceeded"
        free = shutil.disk_usage(next(p for p in [path, *path.absolute().parents] if p.is_dir())).free
        return MachineError(
            f"{path}: {reason}: {needed:,} bytes needed, {free:,} free; make room, or choose another output folder"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return MachineError(f"{path}: not writable ({error.strerror}); choose another output folder")
    if error.errno == errno.EFBIG:
        return MachineError(
            f"{path}: a file of this size is not allowed here ({error.strerror}); lower --max-shard-size"
        )
    return MachineError(f"{path}: cannot be written ({error.strerror or error})")


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes from `5GB`, `500MB`, `1.5GiB` or a plain number; units of 1000 as in transformers, `KiB` … of 1024.

    RecipeError, naming `what` was asked for, for anything else.

    >>> parse_size("5GB"), parse_size("1GiB")
    (5000000000, 1073741824)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)\s*", str(text).upper())
    size = float(match[1]) * UNITS[match[2]] if match and match[2] in UNITS else 0
    if not 1 <= size < math.inf:
        raise RecipeError(f"{what}: got {text!r}, wanted a positive number of bytes, such as 5GB, 500MB or 1GiB")
    return int(size)


def spell_size(size: int) -> str:
    """ "1.25 GB", "12.3 MB" or "640 B": three figures in the unit that fits, units of 1000."""
    number, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 999.5:
            break
        number, unit = number / 1000, larger
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f} {unit}" if unit != "B" else f"{size} B"


def spell_least(size: int) -> str:
    """A spelling of so many bytes, or of a few more: who asks for it gets enough."""
    figure = 10 ** max(0, len(str(size)) - 3)  # what the third figure counts
    return spell_size(-(-size // figure) * figure)


def check_room(output: Path, size: int, held: int = 0) -> None:
    """MachineError unless the nearest existing parent of `output` has room for `size` bytes, of which an unfinished
    run that goes on or is replaced holds `held` already."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise RecipeError(f"--output {output}: {parent} is not a folder")
    free, more = shutil.disk_usage(parent).free, max(0, size - held)
    if free < more:
        beside = f" beside the {spell_size(held)} of the unfinished run" if held else ""
        raise MachineError(
            f"--output {output} needs {spell_size(more)}{beside} and its disk has {spell_size(free)} free; "
            "make room, or choose another --output"
        )


def write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """All of `data` at `offset`, however many calls it takes."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def reserve(descriptor: int, size: int) -> None:
    """Give a new, empty file its size, with disk blocks behind it where the file system can."""
    allocate = getattr(os, "posix_fallocate", None)  # macOS has none
    try:
        if allocate is not None:
            return allocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    os.ftruncate(descriptor, size)


def fsync(path: Path) -> None:
    """Return when the file's contents, or the folder's entries, are on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise disk_error(path, error) from error


def replace_file(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old one or the new one, never half of it."""
    draft = path.with_name(path.name + ".draft")
    try:
        draft.write_text(text, encoding="utf-8")
        fsync(draft)
        draft.replace(path)
    except OSError as error:
        raise disk_error(path, error, len(text)) from error
