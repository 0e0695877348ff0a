"""What a model says of tools and of its thoughts, taken out of its text by transformers' response templates.

transformers has them for some models and takes others from the tokenizer; any other model's text is handed on as it is.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """A part of an answer: text of one kind, or a call of a tool."""

    text: str = ""
    thought: bool = False
    call: tuple[str, str] | None = None  # a tool's name, and its arguments in JSON


class Parts:
    """The parts of one answer, as its text comes."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def take(self, piece: str) -> list[Part]:
        return _parts(self._parser.feed(piece))

    def end(self) -> list[Part]:
        try:
            _, events = self._parser.finalize()
        except (ValueError, RuntimeError):  # it ended within a call, which is then none
            return []
        return _parts(events)


class Responses:
    """Reads the answers of one model."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        from transformers.cli.serving.utils import get_response_template

        self._tokenizer = tokenizer
        self._template: Any = get_response_template(tokenizer, model)

    @property
    def known(self) -> bool:
        return self._template is not None

    def parts(self, prompt: str, tools: list[Any] | None) -> Parts:
        """For the answer to one chat, whose text is `prompt`."""
        from transformers.utils.chat_parsing import ResponseParser

        return Parts(ResponseParser(self._template, prefix=prompt, tools=tools))


def _parts(events: list[dict[str, Any]]) -> list[Part]:
    from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks

    parts = list[Part]()
    for chunk in response_events_to_chunks(events):
        if isinstance(chunk, ToolCall):
            parts.append(Part(call=(chunk.name, chunk.arguments)))
        else:
            parts.append(Part(str(chunk), thought=isinstance(chunk, ReasoningText)))
    return parts
