"""JSON, written in portions: to encode one long list at once would hold up every other thread."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

PORTION = 256  # items


def encoded(value: Any) -> bytes:
    return "".join(_parts(value)).encode()


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        before = "{"
        for key, inner in cast(dict[str, Any], value).items():
            yield f"{before}{json.dumps(key)}: "
            yield from _parts(inner)
            before = ", "
        yield "{}" if before == "{" else "}"
    elif isinstance(value, list) and len(cast(list[Any], value)) > PORTION:
        yield from _long(cast(list[Any], value))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in cast(list[Any], value)):
        yield "["
        for number, item in enumerate(cast(list[Any], value)):
            yield ", " if number else ""
            yield from _parts(item)
        yield "]"
    else:
        yield json.dumps(value)


def _long(items: list[Any]) -> Iterator[str]:
    for first in range(0, len(items), PORTION):
        yield ("," if first else "[") + json.dumps(items[first : first + PORTION])[1:-1]
    yield "]"
