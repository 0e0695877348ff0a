"""From the rows of a table to texts: which column is the text, and how a chat becomes one.

A column is taken if it is named, if it is called `text`, or if nothing else in the row could be it. Chats (`messages` or
`conversations`, lists of who says what; `prompt` beside `completion`) go through the chat template of the tokenizer, as
the model has been trained on them. Whatever else there is to choose from is refused in one line.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from llmsparse.errors import CalibrationError, one_line
from llmsparse.text.bos import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATS = ("messages", "conversations")
PAIR = ("prompt", "completion")
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # as ShareGPT names them
TEMPLATE = "the tokenizer's chat template"
EACH = "each a text, joined by nothing"


class Documents(NamedTuple):
    """The texts of a table, and what its protocol says of them."""

    texts: Iterator[tuple[str]]
    protocol: dict[str, str]


def documents(
    rows: Iterator[Any], text_field: str | None, where: str, tokenizer: PreTrainedTokenizerBase | None
) -> Documents:
    """The texts in `rows`, empty ones left out. Looks at the first row at once: a wrong column is known when opened."""
    first = next(rows, None)
    if first is None:
        raise CalibrationError(f"{where}: is empty, wanted text")
    columns = _columns(first, text_field, where)
    chat = len(columns) > 1 or isinstance(first[columns[0]], list)
    protocol = {"column": " and ".join(columns)} | ({"template": TEMPLATE} if chat else {}) | {"rows": EACH}
    read = _chat_reader(tokenizer, columns, first, where) if chat else _text_reader(columns[0])
    numbered = enumerate(chain([first], rows), 1)
    texts = ((read(row, f"{where}: row {number}"),) for number, row in numbered if _filled(row, columns))
    return Documents(texts, protocol)


def joined(rows: Iterator[Any], text_field: str | None, where: str) -> Documents:
    """All rows, empty ones too, joined by a blank line into one text, as papers do with WikiText."""
    column = text_field or "text"
    lines: list[str] = []
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise CalibrationError(f"{where}: no column {column!r}; it has {', '.join(row)}")
        lines.append("" if row[column] is None else _text_reader(column)(row, f"{where}: row {number}"))
    if not any(lines):
        raise CalibrationError(f"{where}: is empty, wanted text")
    return Documents(iter([("\n\n".join(lines),)]), {"column": column, "rows": "joined by a blank line into one text"})


def _columns(row: dict[str, Any], text_field: str | None, where: str) -> list[str]:
    if text_field is not None:
        if text_field in row:
            return [text_field]
        raise CalibrationError(f"{where}: no column {text_field!r}; it has {', '.join(row)}")
    if "text" in row:
        return ["text"]
    chats = [name for name in CHATS if isinstance(row.get(name), list)]
    if len(chats) == 1:
        return chats
    if all(row.get(name) for name in PAIR):
        return list(PAIR)
    candidates = [name for name, value in row.items() if not isinstance(value, int | float)]
    if len(candidates) == 1 and isinstance(row[candidates[0]], str):
        return candidates
    raise CalibrationError(
        f"{where}: which column is the text? call it 'text', or name it with --text-field; it has {', '.join(row)}"
    )


def _filled(row: dict[str, Any], columns: list[str]) -> bool:
    return all(row.get(name) not in (None, "", []) for name in columns)


def _text_reader(column: str) -> Callable[[dict[str, Any], str], str]:
    def read(row: dict[str, Any], where: str) -> str:
        if not isinstance(row[column], str):
            raise CalibrationError(f"{where}: {column!r} holds {row[column]!r:.40}, wanted text")
        return row[column]

    return read


def _chat_reader(
    tokenizer: PreTrainedTokenizerBase | None, columns: list[str], first: dict[str, Any], where: str
) -> Callable[[dict[str, Any], str], str]:
    named = " and ".join(map(repr, columns))
    if not _messages(first, columns):
        raise CalibrationError(f"{where}: row 1: {named} holds {first[columns[0]]!r:.40}, wanted text")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{where}: {named} holds chats, and the model's tokenizer has no chat template to spell them; name a column of "
            f"text with --text-field; it has {', '.join(first)}"
        )
    before, after = special_tokens(tokenizer) or ([], [])

    def read(row: dict[str, Any], where: str) -> str:
        messages = _messages(row, columns)
        if messages is None:
            raise CalibrationError(f"{where}: {named} holds {row[columns[0]]!r:.40}, wanted a list of role and content")
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template raises what it likes
            raise CalibrationError(f"{where}: the chat template does not take it: {one_line(error)}") from None
        # what the tokenizer itself puts around a text is not put there twice
        text = text.removeprefix(str(tokenizer.decode(before))) if before else text
        return text.removesuffix(str(tokenizer.decode(after))) if after else text

    return read


def _messages(row: dict[str, Any], columns: list[str]) -> list[dict[str, Any]] | None:
    """What a row's columns say, as {"role", "content"} each; None where they are no chat."""
    found: list[dict[str, Any]] = []
    for column, role in zip(columns, ("user", "assistant"), strict=False):
        value = row[column]
        if len(columns) > 1 and isinstance(value, str):
            found.append({"role": role, "content": value})
            continue
        if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
            return None
        found += [_turn(turn) for turn in value]
    known = all(isinstance(turn["role"], str) and turn["content"] is not None for turn in found)
    return found if found and known else None


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    if "role" in turn:
        return turn | {"content": turn.get("content")}
    speaker = turn.get("from")
    return {"role": SPEAKERS.get(str(speaker), speaker), "content": turn.get("value")}
