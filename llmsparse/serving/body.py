"""Bodies of requests: what may come, and how much of it at once."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from json.scanner import py_make_scanner  # pyright: ignore
from typing import Any, NoReturn

from llmsparse.serving.refusal import RefusedError

MOST_BYTES = 8 * 2**20  # of one body
MOST_VALUES = 2**21  # in it, about
MOST_AT_ONCE = 64 * 2**20  # bytes of all bodies that are being read
FEW_VALUES = 2**15  # read by C, which holds up all threads until it is done; more are read by Python, which does not
LONGEST_NUMBER = 400  # characters: no float64 needs more, and reading a whole number takes the square of them


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
    values = sum(body.count(mark) for mark in (b"[", b"{", b","))
    if values > MOST_VALUES:
        raise RefusedError(413, f"the body holds more than {MOST_VALUES} values")
    try:
        return (_QUICK if values <= FEW_VALUES else _PATIENT).decode(body.decode())
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {str(error)[:200]}") from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _whole(text: str) -> int:
    return int(_short(text))


def _real(text: str) -> float:
    return float(_short(text))


def _short(text: str) -> str:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} characters")
    return text


class _Patient(json.JSONDecoder):
    """json's decoder without its C scanner."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scan_once: Any = py_make_scanner(self)


_QUICK = json.JSONDecoder(parse_constant=_no_number, parse_int=_whole, parse_float=_real)
_PATIENT = _Patient(parse_constant=_no_number, parse_int=_whole, parse_float=_real)
