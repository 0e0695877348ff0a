"""`llmsparse serve` in a process of its own, and how to reach it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

import llmsparse

KEY = "correct-horse"
SECONDS = 120  # that nothing here should take


@dataclass
class Running:
    """A server, and how to reach it."""

    process: subprocess.Popen[str]
    model: str
    port: int
    said: list[str]  # before the line with its address
    clients: list[openai.OpenAI] = field(default_factory=list[openai.OpenAI])  # to be closed with it

    def client(self, key: str = KEY) -> openai.OpenAI:
        address = f"http://127.0.0.1:{self.port}/v1"
        self.clients.append(openai.OpenAI(base_url=address, api_key=key, timeout=SECONDS, max_retries=0))
        return self.clients[-1]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.process.kill()
        self.process.communicate()

    def exchange(
        self, method: str, path: str, body: str | bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer to a request as it stands there."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def send(self, method: str, path: str, body: str | bytes | None = None, key: str = KEY) -> tuple[int, Any]:
        """Status and answer, read as JSON."""
        status, _, answer = self.exchange(method, path, body, Authorization=f"Bearer {key}")
        return status, json.loads(answer)

    def ask(self, path: str = "completions", **body: Any) -> tuple[int, Any]:
        return self.send("POST", f"/v1/{path}", json.dumps(body))

    def complete(self, prompt: Any, **body: Any) -> list[Any]:
        """The choices of a completion."""
        status, answer = self.ask(prompt=prompt, **body)
        assert status == 200, answer
        return answer["choices"]

    def events(self, path: str = "completions", **body: Any) -> list[Any]:
        """The data of a stream's events, the last of which is `[DONE]`."""
        status, headers, text = self.exchange(
            "POST", f"/v1/{path}", json.dumps({**body, "stream": True}), Authorization=f"Bearer {KEY}"
        )
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
        data = [line.removeprefix("data: ") for line in text.decode().splitlines() if line]
        assert data.pop() == "[DONE]"
        return [json.loads(line) for line in data]

    def running(self) -> int:
        return self.send("GET", "/health")[1]["running"]


def start(model: str, *arguments: str, cwd: Path | None = None) -> Running:
    path = os.pathsep.join([str(Path(llmsparse.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "llmsparse", "serve", model, "--port", "0", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )
    assert process.stdout is not None
    said = list[str]()
    for line in process.stdout:
        said.append(line.rstrip("\n"))
        if line.startswith("serving "):
            port = line.rpartition("://")[2].partition("/")[0].rpartition(":")[2]
            return Running(process, model, int(port), said[:-1])
    process.kill()
    pytest.fail(f"no server: {said}{process.communicate()[1]}")
