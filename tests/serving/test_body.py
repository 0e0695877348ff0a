"""What comes over the wire, before anybody looks at what it says."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from llmsparse.serving.body import FEW_VALUES, MOST_AT_ONCE, MOST_BYTES, MOST_VALUES, Bodies, parsed
from llmsparse.serving.refusal import RefusedError


def receiving(*parts: bytes) -> Any:
    left = list(parts)

    async def receive() -> dict[str, Any]:
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    return receive


def test_a_body_is_its_parts_and_one_that_is_too_large_is_refused() -> None:
    async def read(*parts: bytes) -> bytes:
        async with Bodies().read(receiving(*parts)) as body:
            return body

    assert asyncio.run(read(b'{"a"', b": 1}")) == b'{"a": 1}'
    with pytest.raises(RefusedError, match="larger than 8 MiB"):
        asyncio.run(read(bytes(MOST_BYTES), b"x"))


def test_many_large_bodies_at_once_are_refused_until_some_are_done() -> None:
    bodies, large = Bodies(), bytes(MOST_BYTES)

    async def held(number: int) -> None:
        async with bodies.read(receiving(large)):
            if number:
                await held(number - 1)

    async def all_of_them() -> None:
        await held(MOST_AT_ONCE // MOST_BYTES - 1)
        with pytest.raises(RefusedError, match="too many large requests") as refused:
            await held(MOST_AT_ONCE // MOST_BYTES)
        assert refused.value.status == 429
        await held(MOST_AT_ONCE // MOST_BYTES - 1)  # none of the refused ones counts any more

    asyncio.run(all_of_them())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b'{"a": ', "not JSON"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"1" * 5000, "not JSON"),
        (b"9" * 401, "a number of 401 characters"),
        (b"0." + b"1" * 400, "a number of 402 characters"),
        (b"[" + b"0," * MOST_VALUES + b"0]", "more than"),
        (b"[" + b"0," * FEW_VALUES + b"NaN]", "NaN is no number"),
        (b"[" * FEW_VALUES * 2, "not JSON"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_not_json_is_refused_in_a_line(body: bytes, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason) as refused:
        parsed(body)
    assert len(str(refused.value)) < 300


def test_many_values_are_read_as_few_are() -> None:
    value = {"prompt": list(range(FEW_VALUES + 1)), "é": [1.5, -0.0, "\n", None, True, {"a": []}]}
    assert parsed(json.dumps(value).encode()) == value
    assert parsed(json.dumps(value, ensure_ascii=False).encode()) == value
