"""The home folder: `~` and `~name` at the start of a path, and its name in what others will read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llmsparse.errors import LlmsparseError


def expand_home(path: str | Path, error: type[LlmsparseError]) -> Path:
    """`path` with the home folder in the place of `~`; `error` where there is no such user, or no file can have that name."""
    try:
        spelled = os.fsencode(path)
        possible = bool(spelled) and b"\0" not in spelled
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise error(f"{str(path)!r}: no file can have this name; give another")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(f"{path}: there is no such user's home folder; write the path out, or ./~ for that name") from None


def without_home(text: str) -> str:
    """A text without the name of the home folder: `~` in its place."""
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"(?<![\w./~-]){re.escape(home)}(?![\w.-])", "~", text)
