"""A request that is not answered, and how what was sent is told back."""

from __future__ import annotations

import reprlib
from typing import Any


class RefusedError(Exception):
    """A request that cannot be answered: HTTP status, and why, for whoever sent it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def shown(value: Any) -> str:
    """A value that a client sent, short enough to be sent back."""
    text = _SHORT.repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


LONGEST = 120  # characters
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxlist = _SHORT.maxdict = 3
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlong = 40
