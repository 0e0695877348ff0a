"""A hundred thousand requests that nobody would send on purpose, and a server that is none the worse for them."""

from __future__ import annotations

import json
import socket
from collections import Counter
from contextlib import closing
from typing import Any

import pytest
from random_requests import Draw, Drawn
from serving_process import SECONDS, Running

REQUESTS = 100_000
FIXED: dict[str, Any] = {"prompt": "def main(", "max_tokens": 24, "temperature": 0, "logprobs": 2, "echo": True}
EXPECTED = {200, 204, 400, 401, 404, 405, 413}


class Wire:
    """A connection that is kept, as plain as it can be: most of the time should be the server's."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        self._file = self._socket.makefile("rb")

    def exchange(self, asked: Drawn) -> tuple[int, bytes]:
        head = f"{asked.method} {asked.path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer correct-horse\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(asked.body)}\r\n\r\n".encode() + asked.body)
        status = int(self._file.readline().split()[1])
        headers = dict[bytes, bytes]()
        while (line := self._file.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        return status, self._read(asked, status, headers)

    def _read(self, asked: Drawn, status: int, headers: dict[bytes, bytes]) -> bytes:
        if asked.method == "HEAD" or status == 204:
            return b""
        if b"content-length" in headers:
            return self._file.read(int(headers[b"content-length"]))
        parts = list[bytes]()
        while size := int(self._file.readline(), 16):
            parts.append(self._file.read(size))
            self._file.readline()
        self._file.readline()
        return b"".join(parts)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.mark.slow
def test_a_hundred_thousand_odd_requests_change_nothing(server: Running) -> None:
    before = server.complete(FIXED["prompt"], **{key: FIXED[key] for key in FIXED if key != "prompt"})
    draw, seen = Draw(seed=11), Counter[int]()
    wire = Wire(server.port)
    for number in range(REQUESTS):
        asked = draw.request()
        status, answer = wire.exchange(asked)
        seen[status] += 1
        assert status in EXPECTED, (number, asked, status, answer[:300])
        if status >= 400 and asked.method != "HEAD":
            error = json.loads(answer)["error"]
            assert error["code"] == status and 0 < len(error["message"]) < 600, (number, asked, answer[:300])
        if status == 200 and b"data: " in answer[:6]:
            assert answer.endswith(b"data: [DONE]\n\n") and b'"error"' not in answer, (number, asked)
    wire.close()
    assert seen[200] > REQUESTS // 20 and seen[400] > REQUESTS // 20, seen
    after = server.complete(FIXED["prompt"], **{key: FIXED[key] for key in FIXED if key != "prompt"})
    assert after == before
    assert server.send("GET", "/health") == (200, {"status": "ok", "running": 0})


def test_a_few_odd_requests_are_each_answered_or_refused(server: Running) -> None:
    draw = Draw(seed=5)
    with closing(Wire(server.port)) as wire:
        assert {wire.exchange(draw.request())[0] for _ in range(500)} <= EXPECTED
