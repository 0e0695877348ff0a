"""The home folder: `~` and `~name` at the start of a path, and its name in what others will read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llmsparse.errors import LlmsparseError


def expand_home(path: str | Path, error: type[LlmsparseError]) -> Path:
    """`path` with the home folder in the place of `~`; `error` where there is no such user, and for a name that neither a
    file nor what is written about it could have."""
    text = os.fspath(path)
    try:
        usable = b"\0" not in text.encode() and text != ""
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise error(f"{text!r}: empty, not UTF-8 or with a NUL in it, which no name may be here; give another")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(f"{path}: there is no such user's home folder; write the path out, or ./~ for that name") from None


def without_home(text: str) -> str:
    """A text without the name of the home folder: `~` in its place."""
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"(?<![\w./~-]){re.escape(home)}(?![\w.-])", "~", text)
