"""From what a client sent to token ids, at a cost that its length bounds.

A text with more bytes than the model's positions could hold is refused unread. One that is shorter, and still long, is
tokenized from its beginning until that says whether it fits.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from llmsparse.serving.refusal import RefusedError, shown
from llmsparse.serving.request import CHAT, MOST_CHOICES, Asked
from llmsparse.serving.template import ChatTemplate

FIRST_LOOK = 16  # bytes a token: a text that is longer for the context is looked at from its beginning
AMPLE = 2  # times the context: a beginning of so many tokens is of no text that fits


@dataclass(frozen=True)
class Prompt:
    """What the model reads."""

    ids: tuple[int, ...]
    text: str | None  # as it was sent; None for ids


class Prompts:
    """Reads prompts for one model."""

    def __init__(self, tokenizer: Any, template: ChatTemplate, context: int, rows: int) -> None:
        """`context`: most tokens of a prompt and its answer; `rows`: of the embedding, one for each id there is."""
        self._tokenizer, self._template, self._context, self._rows = tokenizer, template, context, rows
        self._longest = max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)

    def read(self, asked: Asked) -> list[Prompt]:
        """The prompts of a request. Raises RefusedError."""
        if asked.path == CHAT:
            self._check_size(sum(_bytes(message["content"], "messages") for message in asked.messages), "messages")
            if len(asked.messages) > self._context:
                raise RefusedError(400, f"messages: {len(asked.messages)} of them are more than {self._context} tokens")
            text = self._template.render(asked)
            return [self._checked(Prompt(self._tokenized(text, "messages", special=False), text), "messages")]
        return [self._checked(prompt, "prompt") for prompt in self._texts_or_ids(asked.prompt)]

    def _texts_or_ids(self, value: Any) -> list[Prompt]:
        several = cast(list[Any], value) if isinstance(value, list) else [value]
        if several and all(type(item) is int for item in several):
            several = [several]
        if not several or len(several) > MOST_CHOICES:
            raise RefusedError(400, f"prompt: wanted at least one, and at most {MOST_CHOICES}")
        return [self._text_or_ids(item) for item in several]

    def _text_or_ids(self, item: Any) -> Prompt:
        if isinstance(item, str):
            return Prompt(self._tokenized(item, "prompt", special=True), item)
        ids = cast(list[Any], item) if isinstance(item, list) else []
        if not ids or not all(type(token) is int for token in ids):
            raise RefusedError(400, f"prompt: got {shown(item)}, wanted a text, token ids, or a list of either")
        return Prompt(tuple(ids), None)

    def _tokenized(self, text: str, key: str, special: bool) -> tuple[int, ...]:
        size = _bytes(text, key)
        self._check_size(size, key)
        look = FIRST_LOOK * self._context
        while look < len(text):
            if len(self._ids(text[:look], special)) > AMPLE * self._context:
                raise self._too_long(key, f"more than {AMPLE * self._context} tokens")
            look *= 4
        return tuple(self._ids(text, special))

    def _ids(self, text: str, special: bool) -> list[int]:
        return self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _check_size(self, size: int, key: str) -> None:
        if size > self._context * self._longest:
            raise self._too_long(key, f"{size} bytes, and no token of this model has more than {self._longest}")

    def _too_long(self, key: str, what: str) -> RefusedError:
        return RefusedError(400, f"{key}: {what}; prompt and answer together fit {self._context} tokens")

    def _checked(self, prompt: Prompt, key: str) -> Prompt:
        if not prompt.ids:
            raise RefusedError(400, f"{key}: has no tokens; send some text")
        if len(prompt.ids) > self._context:
            raise self._too_long(key, f"{len(prompt.ids)} tokens")
        largest, smallest = max(prompt.ids), min(prompt.ids)
        if smallest < 0 or largest >= self._rows:
            token = smallest if smallest < 0 else largest
            raise RefusedError(
                400, f"{key}: token {shown(token)} is none of the model's, which are 0 to {self._rows - 1}"
            )
        return prompt


def room_for_answer(prompt: Prompt, asked: Asked, context: int, default: int) -> int:
    """Tokens that the answer may have. RefusedError where that is less than was asked, or none."""
    tokens, left = len(prompt.ids), context - len(prompt.ids)
    if asked.new is not None and asked.new > left:
        raise RefusedError(
            400,
            f"the prompt has {tokens} tokens and {asked.new_key} is {shown(asked.new)}; together they fit {context}: "
            f"ask for {left} at most",
        )
    if asked.new is None and left < 1:
        raise RefusedError(400, f"the prompt has {tokens} tokens; prompt and answer together fit {context}")
    return min(default, left) if asked.new is None else asked.new


def _bytes(text: str, key: str) -> int:
    """Of its UTF-8. RefusedError for what is no text: half of a surrogate pair."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise RefusedError(400, f"{key}: holds half of a surrogate pair, which is no text") from error
