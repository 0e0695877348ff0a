"""Where an answer ends by what it says: strings that a client asked to stop at, across pieces of text."""

from __future__ import annotations

from collections.abc import Sequence


class Stop:
    """Lets text through up to the first stop string. What may be the beginning of one waits for more."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.found = False

    def take(self, piece: str) -> str:
        """What can be said now that `piece` has come; nothing more once a string was found."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [end for end in (text.find(string) for string in self._strings) if end >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back; no text comes any more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` with which `string`, longer than that, begins."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
