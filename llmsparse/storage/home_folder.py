"""`~` and `~name` at the start of a path."""

from __future__ import annotations

from pathlib import Path

from llmsparse.errors import LlmsparseError


def expand_home(path: str | Path, error: type[LlmsparseError]) -> Path:
    """`path` with the home folder in the place of `~`; `error` where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(f"{path}: there is no such user's home folder; write the path out, or ./~ for that name") from None
