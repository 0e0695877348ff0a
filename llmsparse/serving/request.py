"""What a request in OpenAI's format may ask of the server, checked before it reaches the model.

transformers' server ignores what it cannot do. Here such a request is refused with the reason: an answer that looks
like what was asked for, and is not, is worse than none. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PROMPTS = {CHAT: "messages", COMPLETION: "prompt"}
TAKEN = ("model", "max_tokens", "temperature", "top_p", "stream")  # and the prompt
OF_CHAT = ("max_completion_tokens", "tools", "chat_template_kwargs")
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "stream_options", "parallel_tool_calls")
ASKS_NOTHING: dict[str, Any] = {"n": 1, "best_of": 1, "response_format": {"type": "text"}, "tool_choice": "auto"}
NEW_TOKENS = 1024  # where a request does not say, if there is room for as many
GREEDY = 1e-8  # as a temperature: less than any difference of two logits, so that the largest is chosen


class RefusedError(Exception):
    """A request that cannot be answered: HTTP status, and why, for whoever sent it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Served:
    """The model behind the server, as far as requests depend on it."""

    name: str
    context: int  # most tokens of a prompt and its answer together
    vocabulary: int
    count_chat: Callable[[Mapping[str, Any]], int]  # tokens of a chat request; raises what the chat template raises
    count_text: Callable[[str], int]
    chat: bool  # there is a chat template
    sampling: Mapping[str, Any]  # what the model's generation_config says, if it samples; else empty


@dataclass(frozen=True)
class Request:
    """What goes on to the model."""

    body: dict[str, Any]
    sampling: dict[str, Any]  # temperature, top_p and, where the model has one, top_k


def checked(path: str, body: Any, served: Served) -> Request:
    """The request that was sent to `path`, defaults filled in. Raises RefusedError."""
    if not isinstance(body, dict):
        raise RefusedError(400, "the body is no JSON object")
    return _checked(path, cast(dict[str, Any], body), served)


def _checked(path: str, body: dict[str, Any], served: Served) -> Request:
    _check_fields(path, body)
    asked = body.get("model")
    if asked is not None and asked != served.name:
        raise RefusedError(404, f"model {asked!r} is not served here; this server has {served.name!r}")
    tokens = _count(path, body, served)
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    new = _number(body, limit, int, 1, None)
    if tokens >= served.context:
        raise RefusedError(400, f"the prompt has {tokens} tokens; prompt and answer together fit {served.context}")
    if new is not None and tokens + new > served.context:
        raise RefusedError(
            400,
            f"the prompt has {tokens} tokens and {limit} is {new}; together they fit {served.context}: "
            f"ask for {served.context - tokens} at most",
        )
    passed_on = {
        key: body[key]
        for key in (PROMPTS[path], "stream", "tools", "chat_template_kwargs")
        if body.get(key) is not None
    }
    passed_on |= {"model": served.name, "max_tokens": new or min(NEW_TOKENS, served.context - tokens)}
    return Request(passed_on, _sampling(body, served))


def _check_fields(path: str, body: Mapping[str, Any]) -> None:
    """Refuse a field that would change the answer and cannot be honoured."""
    known = (*TAKEN, *WITHOUT_EFFECT, PROMPTS[path], *(OF_CHAT if path == CHAT else ()))
    for key, value in body.items():
        if key not in known and value and value != ASKS_NOTHING.get(key):
            raise RefusedError(400, f"{key}: not supported by this server; leave it out")
    if type(body.get("stream", False)) not in (bool, type(None)):
        raise RefusedError(400, f"stream: got {body['stream']!r}, wanted true or false")


def _count(path: str, body: dict[str, Any], served: Served) -> int:
    """Tokens of the prompt. RefusedError for one that cannot be read."""
    key = PROMPTS[path]
    prompt: Any = body.get(key)
    if path == COMPLETION:
        if isinstance(prompt, list) and len(cast(list[Any], prompt)) == 1:
            body[key] = prompt = cast(list[Any], prompt)[0]
        if not isinstance(prompt, str):
            raise RefusedError(400, "prompt: wanted one text; several at once, or token ids, are not supported")
        tokens = served.count_text(prompt)
        if not tokens:
            raise RefusedError(400, "prompt: has no tokens; send some text")
        return tokens
    if not served.chat:
        raise RefusedError(400, f"model {served.name!r} has no chat template; use {COMPLETION}, with a prompt")
    messages = cast(list[Any], prompt) if isinstance(prompt, list) else []
    if not messages or not all(isinstance(_get(message, "role"), str) for message in messages):
        raise RefusedError(400, "messages: wanted a list of objects, each with a role and its content")
    for message in messages:
        content = _get(message, "content")
        parts = cast(list[Any], content) if isinstance(content, list) else []
        if not all(_get(part, "type") == "text" for part in parts):
            raise RefusedError(400, "messages: only text can be read; leave out images, sound and files")
    try:
        return served.count_chat(body)
    except Exception as error:  # a template raises what it likes, for roles or an order that it does not know
        raise RefusedError(
            400, f"messages: the chat template cannot take them: {' '.join(str(error).split())}"
        ) from error


def _get(thing: Any, key: str) -> Any:
    return cast(dict[str, Any], thing).get(key) if isinstance(thing, dict) else None


def _sampling(body: Mapping[str, Any], served: Served) -> dict[str, Any]:
    """As asked; else as the model's generation_config says; else greedy."""
    own = served.sampling
    temperature = _number(body, "temperature", float, 0, 2)
    top_p = _number(body, "top_p", float, 0, 1)
    if temperature is None:
        temperature = own.get("temperature", 1.0) if own else 0.0
    greedy = temperature == 0
    chosen = {
        "temperature": float(temperature or GREEDY),
        "top_p": 1.0 if greedy else float(own.get("top_p", 1.0) if top_p is None else top_p),
    }
    if own.get("top_k"):
        chosen["top_k"] = 1 if greedy else min(int(own["top_k"]), served.vocabulary)
    return chosen


def _number(body: Mapping[str, Any], key: str, kind: type, least: float, most: float | None) -> Any:
    """body[key] as a number from `least` to `most`, or None if it is not given."""
    value = body.get(key)
    if value is None:
        return None
    number = type(value) is int or (kind is float and type(value) is float)
    if not number or not value >= least or (most is not None and value > most):
        unit = "a whole number" if kind is int else "a number"
        raise RefusedError(400, f"{key}: got {value!r}, wanted {unit} from {least}{f' to {most}' if most else ' up'}")
    return value
