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
        self._context, self._out = 0, len(self._ids)  # from here on decoded; up to here given out

    def take(self, tokens: Iterable[int]) -> str:
        """The text that these tokens add; empty while a character is not whole."""
        self._ids += tokens
        piece = self._piece(len(self._ids))
        if not piece.endswith(UNFINISHED):
            return self._give(piece, len(self._ids))
        if len(self._ids) - self._out < 2 * LONGEST_CHARACTER:
            return ""
        return self._give_what_is_past_mending()

    def end(self) -> str:
        """What was held back; no token comes any more."""
        return self._give(self._piece(len(self._ids)), len(self._ids))

    def _give_what_is_past_mending(self) -> str:
        """All but the last tokens that can still become a character: bytes that are none must not pile up."""
        cuts = [len(self._ids) - left for left in range(1, LONGEST_CHARACTER)]
        whole = [cut for cut in cuts if not self._piece(cut).endswith(UNFINISHED)]
        cut = whole[0] if whole else cuts[-1]
        return self._give(self._piece(cut), cut)

    def _give(self, piece: str, upto: int) -> str:
        if piece:
            self._context, self._out = self._out, upto
            self._ids = self._ids[self._context :]
            self._context, self._out = 0, upto - self._context
        return piece

    def _piece(self, upto: int) -> str:
        known = self._decode(self._ids[self._context : self._out])
        text = self._decode(self._ids[self._context : upto])
        if text.startswith(known):
            return text[len(known) :]
        return self._decode(self._ids[self._out : upto])  # a stray byte spoils the character before it, which is out

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip))
