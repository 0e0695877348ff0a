"""Where an answer ends by what it says: strings that a client asked to stop at, across pieces of text."""

from __future__ import annotations

from collections.abc import Sequence


class Stop:
    """Lets text through up to the string that is whole first; of two that are whole at once the longer one. What may be
    the beginning of a string waits for more. Each letter costs the same, whatever the strings (Knuth, Morris, Pratt)."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [_Matched(string) for string in strings]
        self._held = ""
        self.found = False

    def take(self, piece: str) -> str:
        """What can be said now that `piece` has come; nothing more once a string was found."""
        if self.found or not self._strings:
            return "" if self.found else piece
        text = self._held + piece
        for end in range(len(self._held), len(text)):
            whole = [string.size for string in self._strings if string.take(text[end])]
            if whole:
                self.found, self._held = True, ""
                return text[: end + 1 - max(whole)]
        held = max(string.matched for string in self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back; no text comes any more."""
        held, self._held = self._held, ""
        return held


class _Matched:
    """How many letters of a string the text so far ends with."""

    def __init__(self, string: str) -> None:
        self._string, self.size, self.matched = string, len(string), 0
        self._shorter = [0] * (len(string) + 1)  # of so many matched letters, the next shorter beginning they end with
        matched = 0
        for at in range(1, len(string)):
            while matched and string[at] != string[matched]:
                matched = self._shorter[matched]
            matched += string[at] == string[matched]
            self._shorter[at + 1] = matched

    def take(self, letter: str) -> bool:
        """Whether the string is whole with this letter."""
        while self.matched and letter != self._string[self.matched]:
            self.matched = self._shorter[self.matched]
        self.matched += letter == self._string[self.matched]
        return self.matched == self.size
