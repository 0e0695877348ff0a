"""The messages of a chat as a chat template takes them: content is a text, and the arguments of a call are an object."""

from __future__ import annotations

import json
from typing import Any, cast

from llmsparse.serving.refusal import RefusedError


def read_messages(value: Any) -> list[dict[str, Any]]:
    """As a chat template takes them. RefusedError for what it would not see."""
    messages = cast(list[Any], value) if isinstance(value, list) else []
    if not messages or not all(isinstance(_get(message, "role"), str) for message in messages):
        raise RefusedError(400, "messages: wanted a list of objects, each with a role and its content")
    return [_message(cast(dict[str, Any], message)) for message in messages]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    content: Any = message.get("content")
    parts = cast(list[Any], content) if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    if not all(_get(part, "type") == "text" and isinstance(_get(part, "text"), str) for part in parts):
        raise RefusedError(400, "messages: only text can be read; leave out images, sound and files")
    plain: dict[str, Any] = {"role": message["role"], "content": " ".join(part["text"] for part in parts)}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if isinstance(message.get(key), str):
            plain[key] = message[key]
    if message.get("tool_calls") not in (None, []):
        plain |= {"tool_calls": _calls(message["tool_calls"]), "content": ""}  # it would be the same calls again
    return plain


def _calls(value: list[Any]) -> list[dict[str, Any]]:
    try:
        return [_call(call) for call in value]
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise RefusedError(
            400, "messages: tool_calls: wanted a list of calls, each a function with a name and its arguments in JSON"
        ) from error


def _call(call: Any) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _get(thing: Any, key: str) -> Any:
    return cast(dict[str, Any], thing).get(key) if isinstance(thing, dict) else None
