"""A chat, written as the model's own chat template says; nothing of a request is run as a template.

A request may set what the template itself reads, and nothing that transformers takes for its own. The model's template
can still be slow, so it is given a deadline.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

import inspect
from typing import Any

from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from transformers.utils.chat_template_utils import _compile_jinja_template

from llmsparse.errors import one_line
from llmsparse.serving.deadline import TooSlowError, within
from llmsparse.serving.refusal import RefusedError, shown
from llmsparse.serving.request import COMPLETION, Asked

SECONDS = 5.0  # to render a chat
NOT_OPTIONS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})
LONGEST_OPTION = 4096  # characters
LARGEST_OPTION = 10**6


class ChatTemplate:
    """The template of a tokenizer, which may have none."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        self._tokenizer, self._model = tokenizer, model
        self.exists = bool(getattr(tokenizer, "chat_template", None))
        if not self.exists:
            return
        reads = _variables(tokenizer.get_chat_template()) | _variables(tokenizer.get_chat_template(tools=[{}]))
        self.knows_tools = "tools" in _variables(tokenizer.get_chat_template(tools=[{}]))
        arguments = inspect.signature(tokenizer.apply_chat_template).parameters
        self.options = frozenset(reads - NOT_OPTIONS - arguments.keys() - tokenizer.special_tokens_map.keys())

    def render(self, asked: Asked) -> str:
        """The text of a chat, up to where the answer begins. Raises RefusedError."""
        self.check(asked)
        try:
            return within(SECONDS, lambda: self._apply(asked))
        except TooSlowError as error:
            raise RefusedError(400, f"messages: the chat template took longer than {SECONDS:.0f} s") from error
        except TemplateError as error:  # for roles, or an order of them, that it does not know
            raise RefusedError(400, f"messages: the chat template cannot take them: {one_line(error)}") from error
        except Exception as error:  # what it does to values that it does not expect
            reason = f"messages: the chat template cannot take them ({type(error).__name__})"
            raise RefusedError(400, reason) from error

    def check(self, asked: Asked) -> None:
        """Refuse what this template has no word for."""
        if not self.exists:
            raise RefusedError(400, f"model {self._model!r} has no chat template; use {COMPLETION}, with a prompt")
        if asked.tools and not self.knows_tools:
            raise RefusedError(400, "tools: the chat template of this model knows no tools; leave them out")
        for key, value in asked.template_options.items():
            if key not in self.options:
                known = f"it reads {', '.join(sorted(self.options))}" if self.options else "it reads none"
                raise RefusedError(400, f"chat_template_kwargs: {shown(key)} is no option of the template; {known}")
            if not _is_plain(value):
                raise RefusedError(
                    400,
                    f"chat_template_kwargs: {key}: got {shown(value)}, wanted true, false, a number or a short text",
                )

    def _apply(self, asked: Asked) -> str:
        return self._tokenizer.apply_chat_template(
            asked.messages, tools=asked.tools, add_generation_prompt=True, tokenize=False, **asked.template_options
        )


def _variables(template: str) -> set[str]:
    """What a template reads and does not set itself."""
    environment = _compile_jinja_template(template).environment
    return find_undeclared_variables(environment.parse(template)) - environment.globals.keys()


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_OPTION
    return value is None or (isinstance(value, bool | int | float) and abs(value) <= LARGEST_OPTION)
