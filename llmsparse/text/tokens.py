"""A text of any length → token ids, the same as if all of it were tokenized at once, in the memory of a piece of it.

A tokenizer keeps a few hundred bytes a token while it works, gigabytes for a text of some hundred megabytes. So a long
text is tokenized in pieces that overlap, and two pieces are joined where both found the same tokens, many in a row, at
the same places: left of there the first piece is right, which knows what comes before, and from there on the second.
Pieces that do not agree become one. That takes a tokenizer that says where its tokens stand (a "fast" one); others get
the text whole.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llmsparse.text.bos import special_tokens, special_with

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 2**20  # characters tokenized at once
OVERLAP = 2**12  # characters that two pieces share
AGREED = 32  # tokens in a row that two pieces must have in common


def tokenize(text: Iterable[str], tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> Iterator[list[int]]:
    """Token ids of one text, given in parts, some at a time, with the special tokens that the tokenizer gives it; with a
    BOS or without one where `bos` says so."""
    parts = _Parts(text)
    held = parts.take(PIECE)
    special = special_tokens(tokenizer) if bos is None else special_with(tokenizer, bos)
    if len(held) < PIECE or special is None or not getattr(tokenizer, "is_fast", False):
        whole: Any = tokenizer(held + parts.rest(), add_special_tokens=bos is None, verbose=False)
        before, after = special if bos is not None and special else ([], [])
        yield [*before, *whole["input_ids"], *after]
        return
    before, after = special
    if before:
        yield before
    piece = _Piece(held, tokenizer)
    start = 0  # where in the piece what has not been given out begins
    size = PIECE
    while more := parts.take(size):
        shared = held[-OVERLAP:]
        following = _Piece(shared + more, tokenizer)
        joint = _joint(piece, following, len(held) - len(shared))
        if joint is None:
            held += more
            piece, size = _Piece(held, tokenizer), len(held)
            continue
        yield piece.ids[piece.at(start) : piece.at(joint)]
        start = joint - (len(held) - len(shared))
        held, piece, size = shared + more, following, PIECE
    yield piece.ids[piece.at(start) :]
    if after:
        yield after


class _Parts:
    """A text that comes in parts of any length, taken in pieces of a given one."""

    def __init__(self, text: Iterable[str]) -> None:
        self._parts = iter(text)
        self._left = ""

    def take(self, size: int) -> str:
        """The next `size` characters, fewer only at the end."""
        found, length = [self._left], len(self._left)
        while length < size and (part := next(self._parts, None)) is not None:
            found.append(part)
            length += len(part)
        joined = "".join(found)
        self._left = joined[size:]
        return joined[:size]

    def rest(self) -> str:
        return "".join([self._left, *self._parts])


class _Piece:
    """A piece of a text, tokenized, without special tokens."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoding: Any = tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]  # pyright: ignore[reportOptionalSubscript]
        self.ids: list[int] = self._encoding.ids

    def at(self, start: int) -> int:
        """The number of the token that begins at a character, one that `begins_at` found, or at 0."""
        return 0 if start == 0 else self._encoding.char_to_token(start)

    def token(self, number: int) -> tuple[int, int, int]:
        """Id, first character and end of a token."""
        begin, end = self._encoding.token_to_chars(number) or (0, 0)
        return self.ids[number], begin, end

    def begins_at(self, start: int) -> int | None:
        """The number of the token that begins at a character, None where none does, or where several share it."""
        number = self._encoding.char_to_token(start)
        if number is None or self.token(number)[1] != start or (number and self.token(number - 1)[2] > start):
            return None
        return number


def _joint(piece: _Piece, following: _Piece, shift: int) -> int | None:
    """A character of `piece`, `shift` further on than in `following`, from which on both have the same tokens.

    Both ends of the overlap are left out: what a piece finds there may depend on what it does not see.
    """
    for start in range(shift + OVERLAP // 2, shift + OVERLAP * 3 // 4):
        here, there = piece.begins_at(start), following.begins_at(start - shift)
        if here is None or there is None:
            continue
        if all(_agree(piece, here + step, following, there + step, shift) for step in range(AGREED)):
            return start
    return None


def _agree(piece: _Piece, here: int, following: _Piece, there: int, shift: int) -> bool:
    if here >= len(piece.ids) or there >= len(following.ids):
        return False
    token, begin, end = piece.token(here)
    return following.token(there) == (token, begin - shift, end - shift)
