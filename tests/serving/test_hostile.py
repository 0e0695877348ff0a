"""What a client may send to bring a server down, and does not."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_random, tiny_config
from serving_process import Running

FIXED = {"prompt": "def main(", "max_tokens": 12, "temperature": 0}


@contextmanager
def health_watched(server: Running) -> Iterator[list[float]]:
    """How long /health took, in seconds, asked over and over beside what is done within."""
    waits, over = list[float](), threading.Event()

    def watch() -> None:
        while not over.is_set():
            began = time.monotonic()
            assert server.exchange("GET", "/health")[0] == 200
            waits.append(time.monotonic() - began)
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    yield waits
    over.set()
    thread.join()


def idle(server: Running) -> bool:
    """Whether nothing runs any more; a request that was sent and left at once may still be read, and then go."""
    deadline, quiet = time.monotonic() + 60, 0
    while quiet < 10 and time.monotonic() < deadline:
        quiet = 0 if server.running() else quiet + 1
        time.sleep(0.05)
    return quiet == 10


def test_long_prompts_are_refused_while_health_is_told(trained: Running) -> None:
    asked = json.dumps({"prompt": "word " * 10**6})
    chat = json.dumps({"messages": [{"role": "user", "content": "word " * 10**6}]})
    many = json.dumps({"prompt": [5] * 400_000})
    with health_watched(trained) as waits:
        for path, body in (("completions", asked), ("completions", many), ("chat/completions", chat)):
            assert trained.send("POST", f"/v1/{path}", body)[0] == 400
        assert trained.send("POST", "/v1/completions", b" " * (9 * 2**20))[0] == 413
        assert trained.send("POST", "/v1/completions", b'{"prompt": [' + b"[]," * 10**6 + b"[]]}")[0] == 400
        assert trained.send("POST", "/v1/completions", b"[" + b"0," * 3 * 10**6 + b"0]")[0] == 413
    assert waits and trained.ask(prompt="def ", max_tokens=1)[0] == 200


def test_clients_that_hang_up_leave_nothing_running(trained: Running) -> None:
    body = json.dumps({"prompt": "def f", "max_tokens": 480, "temperature": 1.5})
    for stream in (False, True):
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", trained.port, timeout=60)
            connection.request("POST", "/v1/completions", body[:-1] + f', "stream": {str(stream).lower()}}}')
            while not trained.running():
                time.sleep(0.01)
            connection.close()
        assert idle(trained)


def test_a_body_that_never_ends_holds_nobody_up(trained: Running) -> None:
    with socket.create_connection(("127.0.0.1", trained.port)) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert trained.ask(prompt="def ", max_tokens=1)[0] == 200
    with socket.create_connection(("127.0.0.1", trained.port)) as nonsense:
        nonsense.sendall(b"\x00\x01\x02\r\n\r\n")
    assert trained.ask(prompt="def ", max_tokens=1)[0] == 200


def test_connections_that_only_wait_keep_nobody_out(trained: Running) -> None:
    with ExitStack() as waiting:
        for _ in range(500):
            waiting.enter_context(socket.create_connection(("127.0.0.1", trained.port)))
        assert trained.send("GET", "/health")[0] == 200
        assert trained.ask(prompt="def ", max_tokens=1)[0] == 200


@pytest.mark.parametrize("path", ["/v1/%00", "/v1/models/%ff%fe", "/v1/models/../../etc", "/" + "x" * 5000])
def test_odd_paths_are_not_found(trained: Running, path: str) -> None:
    assert trained.exchange("GET", path)[0] == 404


def test_more_than_the_queue_holds_is_429_and_what_waits_is_answered(trained: Running) -> None:
    asked = json.dumps({"prompt": ["def "] * 64, "n": 2, "max_tokens": 400, "temperature": 1})
    connections = [http.client.HTTPConnection("127.0.0.1", trained.port, timeout=60) for _ in range(12)]
    for connection in connections:
        connection.request("POST", "/v1/completions", asked)
    deadline = time.monotonic() + 60
    while trained.running() < 1024 and time.monotonic() < deadline:
        time.sleep(0.02)
    with health_watched(trained) as waits:
        status, headers, answer = trained.exchange("POST", "/v1/completions", asked)
    assert status == 429 and headers["retry-after"] == "1" and waits
    assert json.loads(answer)["error"]["type"] == "rate_limit_error"
    for connection in connections:
        connection.close()
    assert idle(trained)
    assert trained.ask(prompt="def ", max_tokens=1)[0] == 200


def test_a_refusal_names_no_folder_and_no_tokenizer(server: Running) -> None:
    hostile: list[dict[str, Any]] = [
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"return_tensors": "pt"}},
        {"messages": [{"role": "user", "content": "\udc00"}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
        {"prompt": [10**9]},
    ]
    for body in hostile:
        path = "chat/completions" if "messages" in body else "completions"
        status, answer = server.ask(path, **body)
        said = answer["error"]["message"]
        assert status == 400 and len(said) < 300
        assert not [
            word for word in ("Tokenizer", "/", "vocab_size", "object at") if word in said.replace("/v1/", "")
        ], said


@pytest.fixture
def odd(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer has a token more than the embedding has rows."""
    from transformers import AutoTokenizer

    folder = save_random(tiny_config("llama", vocab_size=384), tmp_path / "odd")
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_without_a_row_is_that_requests_own(odd: Path, started: Callable[..., Running]) -> None:
    server = started(str(odd))
    before = server.complete("once", max_tokens=4)
    status, answer = server.ask(prompt="<|im_start|>once", max_tokens=4)
    assert status == 400 and "token 384 is none of the model's, which are 0 to 383" in answer["error"]["message"]
    assert server.complete("once", max_tokens=4) == before


@pytest.mark.slow
def test_logits_that_are_no_numbers_end_the_request_and_not_the_server(
    odd: Path, started: Callable[..., Running]
) -> None:
    from safetensors.torch import load_file, save_file

    for file in odd.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][300] = torch.nan
            save_file(tensors, file, metadata={"format": "pt"})
    server = started(str(odd))
    before = server.complete([5, 6], max_tokens=4)
    for asked in ({}, {"temperature": 1.0}, {"repetition_penalty": 1.2}):
        status, answer = server.ask(prompt=[5, 300], max_tokens=4, **asked)
        assert status == 500 and "NaN" in answer["error"]["message"]
    events = server.events(prompt=[5, 300], max_tokens=4)
    assert events[-1]["error"]["type"] == "server_error" and events[-1]["error"]["code"] == 500
    assert server.complete([5, 6], max_tokens=4) == before and server.send("GET", "/health")[0] == 200
