"""Text as its tokens come, each piece as soon as no later token can change it.

A token's text depends on those before it: a tokenizer drops the blank at the start of what it decodes, and some
characters are several tokens. So a few tokens that are already out are decoded along with the new ones, and what could
become part of a character waits for the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

CONTEXT_TOKENS = 6  # of the prompt, decoded along with the first new one
UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet one
LONGEST_CHARACTER = 4  # bytes of UTF-8, hence tokens


class Detokenizer:
    """The pieces given out, one after the other, are the text that follows `prompt`: none is lost or taken back."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._out = len(self._ids)  # up to here given out; what is before is context
        self._sound = list(self._ids)  # the last tokens without a spoiled character

    def take(self, tokens: Iterable[int]) -> str:
        """The text that these tokens add; empty while a character is not whole."""
        self._ids += tokens
        return self._give(last=False)

    def end(self) -> str:
        """What was held back; no token comes any more."""
        return self._give(last=True)

    def _give(self, last: bool) -> str:
        piece, upto = self._after(self._out, len(self._ids)), len(self._ids)
        if UNFINISHED in piece:
            piece, upto = self._mended(last)
        if _is_whole(piece):
            self._sound = self._ids[self._out : upto]
        if piece:
            self._ids, self._out = self._ids[self._out :], upto - self._out
        elif len(self._ids) - self._out > LONGEST_CHARACTER:
            del self._ids[self._out :]  # tokens without text: they must not pile up
        return piece

    def _mended(self, last: bool) -> tuple[str, int]:
        """Text with bytes in it that are no character, and up to which token. A decoder may spoil what stands beside
        such a byte, so the tokens of each character are decoded by themselves, and a token that is part of none, too."""
        piece, first = "", self._out
        while first < len(self._ids):
            ends = range(first + 1, min(first + LONGEST_CHARACTER, len(self._ids)) + 1)
            whole = next((end for end in ends if _is_whole(self._alone(first, end))), None)
            if whole is None and not last and self._may_become_whole(first):
                break
            end = whole or first + 1
            piece += self._alone(first, end)
            first = end
        return piece, first

    def _may_become_whole(self, first: int) -> bool:
        """Whether all that has come from `first` on may be the beginning of one character."""
        later = range(first + 1, len(self._ids))
        return len(later) < LONGEST_CHARACTER - 1 and not any(_is_whole(self._alone(at, at + 1)) for at in later)

    def _alone(self, first: int, end: int) -> str:
        """The text of the tokens from `first` to `end`, whatever those just before them have spoiled."""
        text = self._after(first, end)
        if _is_whole(text):
            return text
        alone = self._added(self._sound, self._ids[first:end])
        return alone if _is_whole(alone) or not text else text

    def _after(self, first: int, end: int) -> str:
        return self._added(self._ids[:first], self._ids[first:end])

    def _added(self, before: list[int], ids: list[int]) -> str:
        """What `ids` add to the text of those before."""
        known, text = self._decode(before), self._decode(before + ids)
        return text[len(known) :] if text.startswith(known) else self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip))


def _is_whole(text: str) -> bool:
    return bool(text) and UNFINISHED not in text
