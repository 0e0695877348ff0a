"""Bodies of requests: what may come, and how much of it at once."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from llmsparse.serving.refusal import RefusedError

MOST_BYTES = 8 * 2**20  # of one body
MOST_VALUES = 2**19  # in it, about: reading JSON holds up all threads, at these bounds for some 50 ms
MOST_AT_ONCE = 64 * 2**20  # bytes of all bodies that are being read


class Bodies:
    """Reads them, and knows how many bytes there are now."""

    def __init__(self) -> None:
        self._bytes = 0

    @asynccontextmanager
    async def read(self, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> AsyncGenerator[bytes]:
        """The body of a request, for as long as it is needed. Raises RefusedError for one that is too large."""
        parts = bytearray()
        try:
            more = True
            while more:
                message = await receive()
                part = message.get("body", b"")
                parts += part
                self._bytes += len(part)
                more = message["type"] != "http.disconnect" and message.get("more_body", False)
                if len(parts) > MOST_BYTES:
                    raise RefusedError(413, f"the body is larger than {MOST_BYTES >> 20} MiB")
                if self._bytes > MOST_AT_ONCE:
                    raise RefusedError(429, "too many large requests come at once; try again later")
            yield bytes(parts)
        finally:
            self._bytes -= len(parts)


def parsed(body: bytes) -> Any:
    """What JSON says, and no more than that: NaN is none. Raises RefusedError."""
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > MOST_VALUES:
        raise RefusedError(413, f"the body holds more than {MOST_VALUES} values")
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {str(error)[:200]}") from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
