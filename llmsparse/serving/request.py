"""What a request in OpenAI's format may ask of the server, checked before it costs anything.

What would change the answer and cannot be done is refused with the reason: an answer that looks like what was asked
for, and is not, is worse than none. So is what is out of range, zeros included. Knows nothing of HTTP, and of tokens
only their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from llmsparse.inference.sampling import Sampling
from llmsparse.serving.messages import read_messages
from llmsparse.serving.refusal import RefusedError, shown

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PROMPTS = {CHAT: "messages", COMPLETION: "prompt"}
TAKEN = (
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "n",
    "logprobs",
    "stream",
    "stream_options",
)
OF_PATH = {
    CHAT: ("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "chat_template_kwargs"),
    COMPLETION: ("prompt", "echo", "best_of"),
}
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
)
ASKS_NOTHING: dict[str, Any] = {"response_format": {"type": "text"}, "logit_bias": {}, "suffix": "", "functions": []}
MOST_CHOICES = 128  # answers to one request
MOST_STOPS = 64
MOST_LOGPROBS = 20
LONGEST_STOP = 1024  # characters
PENALTIES = (0.1, 10)  # by which logits are divided: less or more makes them infinite
SEEDS = (-(2**63), 2**64 - 1)


@dataclass(frozen=True)
class Asked:
    """A request that can be understood. Prompts are still as they came."""

    path: str
    prompt: Any  # of COMPLETION: texts or token ids
    messages: list[dict[str, Any]]  # of CHAT
    tools: list[Any] | None
    template_options: dict[str, Any]
    new: int | None  # tokens at most
    new_key: str  # under which it was asked
    sampling: Sampling
    choices: int  # answers to each prompt
    stop: tuple[str, ...]
    logprobs: int | None
    echo: bool
    stream: bool
    usage: bool  # in a stream, in a chunk of its own


def read(path: str, body: Any, names: Mapping[str, Any] | frozenset[str], name: str) -> Asked:
    """The request that was sent to `path` of a server whose model has these `names`. Raises RefusedError."""
    if not isinstance(body, dict):
        raise RefusedError(400, "the body is no JSON object")
    fields = _Fields(cast(dict[str, Any], body))
    fields.refuse_unknown((*TAKEN, *WITHOUT_EFFECT, *OF_PATH[path]))
    asked = fields.get("model")
    if asked is not None and not (isinstance(asked, str) and asked in names):
        raise RefusedError(404, f"model {shown(asked)} is not served here; this server has {name!r}")
    chat = path == CHAT
    key = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    stream = fields.flag("stream")
    return Asked(
        path=path,
        prompt=fields.get("prompt"),
        messages=read_messages(fields.get("messages")) if chat else [],
        tools=_tools(fields),
        template_options=fields.mapping("chat_template_kwargs"),
        new=fields.whole(key, 1 if chat else 0, None),
        new_key=key,
        sampling=_sampling(fields),
        choices=_choices(fields),
        stop=_stop(fields.get("stop")),
        logprobs=_chat_logprobs(fields) if chat else _completion_logprobs(fields),
        echo=fields.flag("echo"),
        stream=stream,
        usage=_usage(fields, stream),
    )


@dataclass(frozen=True)
class _Fields:
    body: dict[str, Any] = field(default_factory=dict[str, Any])

    def get(self, key: str) -> Any:
        return self.body.get(key)

    def refuse_unknown(self, known: tuple[str, ...]) -> None:
        """Refuse a field that would change the answer and cannot be honoured. null is as if it were not there."""
        for key, value in self.body.items():
            if key not in known and value is not None and not (key in ASKS_NOTHING and value == ASKS_NOTHING[key]):
                raise RefusedError(400, f"{shown(key)[1:-1]}: not supported by this server; leave it out")

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if type(value) not in (bool, type(None)):
            raise RefusedError(400, f"{key}: got {shown(value)}, wanted true or false")
        return bool(value)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.get(key)
        if not isinstance(value, dict | None):
            raise RefusedError(400, f"{key}: got {shown(value)}, wanted an object")
        return cast(dict[str, Any], value or {})

    def whole(self, key: str, least: int, most: int | None) -> int | None:
        value = self.get(key)
        if value is not None and (type(value) is not int or value < least or (most is not None and value > most)):
            raise _out_of_range(key, value, "a whole number", least, most)
        return value

    def number(self, key: str, least: float, most: float) -> float | None:
        value = self.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not least <= value <= most:
            raise _out_of_range(key, value, "a number", least, most)
        return float(value)


def _out_of_range(key: str, value: Any, kind: str, least: float, most: float | None) -> RefusedError:
    upto = " up" if most is None else f" to {most}"
    return RefusedError(400, f"{key}: got {shown(value)}, wanted {kind} from {least}{upto}")


def _sampling(fields: _Fields) -> Sampling:
    top_k = fields.whole("top_k", -1, 2**31)
    return Sampling(
        temperature=fields.number("temperature", 0, 2),
        top_p=fields.number("top_p", 0, 1),
        top_k=None if top_k is None else max(top_k, 0),
        min_p=fields.number("min_p", 0, 1),
        repetition_penalty=fields.number("repetition_penalty", *PENALTIES),
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        seed=fields.whole("seed", *SEEDS),
    )


def _choices(fields: _Fields) -> int:
    choices = fields.whole("n", 1, MOST_CHOICES) or 1
    best_of = fields.whole("best_of", 1, MOST_CHOICES)
    if best_of not in (None, choices):
        raise RefusedError(400, f"best_of: got {best_of}, and n is {choices}; choosing among answers is not supported")
    return choices


def _stop(value: Any) -> tuple[str, ...]:
    strings = cast(list[Any], [value] if isinstance(value, str) else [] if value is None else value)
    if not isinstance(value, str | list | None) or not all(isinstance(text, str) and text for text in strings):
        raise RefusedError(400, f"stop: got {shown(value)}, wanted a text, or a list of texts, none of them empty")
    if len(strings) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in strings):
        raise RefusedError(400, f"stop: wanted at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters")
    return tuple(strings)


def _completion_logprobs(fields: _Fields) -> int | None:
    if fields.get("logprobs") is False:  # of the chat's kind; asks for nothing
        return None
    return fields.whole("logprobs", 0, MOST_LOGPROBS)


def _chat_logprobs(fields: _Fields) -> int | None:
    likeliest = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if fields.flag("logprobs"):
        return likeliest or 0
    if likeliest:
        raise RefusedError(400, f"top_logprobs: got {likeliest} without logprobs; set logprobs to true")
    return None


def _usage(fields: _Fields, stream: bool) -> bool:
    options = _Fields(fields.mapping("stream_options"))
    options.refuse_unknown(("include_usage", "include_obfuscation"))
    return options.flag("include_usage") and stream


def _tools(fields: _Fields) -> list[Any] | None:
    tools, choice = fields.get("tools"), fields.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise RefusedError(400, f"tool_choice: got {shown(choice)}, wanted none or auto; the model chooses its tools")
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in cast(list[Any], tools or [])):
        raise RefusedError(400, "tools: wanted a list of objects")
    return None if choice == "none" else cast(list[Any], tools) or None
