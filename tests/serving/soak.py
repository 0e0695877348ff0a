"""Clients that come and go: `python tests/serving/soak.py MODEL SECONDS` asks a server of MODEL, and says what became of it.

Eight of them ask for answers of all kinds, and half of the time hang up before they have one. Memory must not grow, no
place in the batch may be lost, and at the end the server answers as it did at the beginning.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_process import Running, start

CLIENTS = 8
FIXED: dict[str, Any] = {"prompt": "def main(", "max_tokens": 24, "temperature": 0}


@dataclass
class Soak:
    """What was seen."""

    ends: Counter[str] = field(default_factory=Counter[str])
    memory: list[int] = field(default_factory=list[int])  # bytes, at equal intervals after the first tenth
    health_seconds: list[float] = field(default_factory=list[float])
    left_running: int = 0
    reserved: float = 0
    same: bool = False

    @property
    def growth(self) -> float:
        """Of memory, the last third over the first third."""
        third = max(1, len(self.memory) // 3)
        return (sum(self.memory[-third:]) / third) / (sum(self.memory[:third]) / third) - 1

    def summary(self) -> str:
        slowest, usual = max(self.health_seconds), sorted(self.health_seconds)[len(self.health_seconds) // 2]
        return (
            f"{sum(self.ends.values())} requests: {dict(self.ends)}; memory {self.memory[0] / 1e6:.0f} → "
            f"{self.memory[-1] / 1e6:.0f} MB ({self.growth:+.1%}); /health after {usual * 1e3:.0f} ms, at most "
            f"{slowest * 1e3:.0f}; {self.left_running} left running, {self.reserved:.0f} tokens reserved; "
            f"the same answer: {self.same}"
        )


def soak(server: Running, seconds: float, seed: int = 0) -> Soak:
    seen, over = Soak(), threading.Event()
    before = server.ask(**FIXED)[1]["choices"]
    threads = [threading.Thread(target=_client, args=(server, over, seen, seed + n)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        asked = time.monotonic()
        assert server.exchange("GET", "/health")[0] == 200
        seen.health_seconds.append(time.monotonic() - asked)
        if now > seconds / 10:
            seen.memory.append(_resident(server))
        time.sleep(min(0.25, seconds / 100))
    over.set()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 60
    while server.running() and time.monotonic() < deadline:
        time.sleep(0.05)
    seen.left_running = server.running()
    lines = server.exchange("GET", "/metrics")[2].decode().splitlines()
    seen.reserved = next(float(line.split()[1]) for line in lines if line.startswith("llmsparse_reserved_tokens"))
    seen.same = server.ask(**FIXED)[1]["choices"] == before
    return seen


def _client(server: Running, over: threading.Event, seen: Soak, seed: int) -> None:
    draw = random.Random(seed)
    while not over.is_set():
        body: dict[str, Any] = {
            "prompt": draw.choice(["def ", "import ", ["x = ", "class "], [5, 6, 7], "a" * 40]),
            "max_tokens": draw.choice([1, 5, 20, 60]),
            "temperature": draw.choice([0, 1, 2]),
            "n": draw.choice([1, 1, 3]),
            "stream": draw.random() < 0.5,
            "logprobs": draw.choice([None, None, 2]),
            "stop": draw.choice([None, "return", ["\n\n", "zz"]]),
            "seed": draw.choice([None, None, 5]),
        }
        seen.ends[_ask(server, json.dumps(body), draw)] += 1


def _ask(server: Running, body: str, draw: random.Random) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", body, {"Authorization": "Bearer correct-horse"})
        if draw.random() < 0.25:
            time.sleep(draw.random() / 20)
            return "hung up waiting"
        answer = connection.getresponse()
        if draw.random() < 0.25:
            answer.read(draw.randrange(1, 200))
            return "hung up reading"
        answer.read()
        return str(answer.status)
    finally:
        connection.close()


def _resident(server: Running) -> int:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    running = start(sys.argv[1], "--api-key", "correct-horse")
    try:
        print(soak(running, float(sys.argv[2])).summary())
    finally:
        running.close()
