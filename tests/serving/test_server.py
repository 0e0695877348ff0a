"""A server in a process of its own, and OpenAI's client: what is served, what is refused, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from serving_process import SECONDS, Running

from llmsparse.cli.app import main


def end(server: Running, number: int) -> tuple[int, str, str]:
    """Exit code, stdout and stderr after a signal."""
    server.process.send_signal(number)
    out, err = server.process.communicate(timeout=SECONDS)
    return server.process.returncode, out, err


def test_it_answers_chats_and_completions_as_generate_does(server: Running, greedy: Any) -> None:
    client, model = server.client(), server.model
    done = client.completions.create(model=model, prompt="def main(", max_tokens=8, temperature=0)
    assert done.choices[0].text == greedy("def main(", 8) and done.choices[0].finish_reason == "length"
    assert done.usage is not None and done.usage.completion_tokens == 8 and done.model == model
    chat = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=6)
    assert chat.choices[0].message.content == greedy("user: hi\nassistant:", 6)


def test_a_streamed_answer_is_the_whole_answer_in_pieces(server: Running, greedy: Any) -> None:
    options: dict[str, Any] = {"model": server.model, "max_tokens": 12, "stream": True}
    pieces = [part.choices[0].text for part in server.client().completions.create(prompt="import ", **options)]
    assert "".join(pieces) == greedy("import ", 12) and len(pieces) > 3
    message: Any = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    deltas = [part.choices[0].delta for part in server.client().chat.completions.create(messages=message, **options)]
    assert "".join(delta.content or "" for delta in deltas) == greedy("user: hi\nassistant:", 12)


def test_concurrent_requests_sample_each_as_it_asks(server: Running, greedy: Any) -> None:
    client = server.client()

    def ask(number: int) -> str:
        temperature = 2.0 if number % 2 else 0.0  # the first to arrive must not decide for the others
        done = client.completions.create(
            model=server.model, prompt=f"x{number // 2} = ", max_tokens=20, temperature=temperature
        )
        return done.choices[0].text

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(8)))
    wanted = [greedy(f"x{number} = ", 20) for number in range(4)]
    assert answers[::2] == wanted
    assert all(sampled != chosen for sampled, chosen in zip(answers[1::2], wanted, strict=True))


def test_models_and_health_say_what_is_served(server: Running) -> None:
    assert [model.id for model in server.client().models.list()] == [server.model]
    assert server.send("GET", "/health", key="none") == (200, {"status": "ok", "running": 0})


def test_a_wrong_key_or_none_is_401_on_every_path(server: Running) -> None:
    for ask in (
        lambda client: client.models.list(),
        lambda client: client.completions.create(model=server.model, prompt="x", max_tokens=1),
        lambda client: client.chat.completions.create(model=server.model, messages=[]),
    ):
        with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
            ask(server.client("wrong"))
    for path in ("/v1/models", "/v1/responses", "/v1/none"):
        assert server.send("GET", path, key="")[0] == 401


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("completions", '{"prompt": ', 400, "not JSON"),
        ("completions", "[1]", 400, "no JSON object"),
        ("completions", '{"prompt": ["a", 1]}', 400, "a text, token ids, or a list of either"),
        ("completions", '{"prompt": [[5, 384]]}', 400, "token 384 is none of the model's, which are 0 to 383"),
        ("completions", '{"prompt": [-1]}', 400, "token -1 is none"),
        ("completions", '{"prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        ("completions", '{"prompt": "x", "temperature": NaN}', 400, "NaN is no number of JSON"),
        ("completions", '{"prompt": "x", "max_tokens": -1}', 400, "max_tokens: got -1"),
        ("completions", '{"prompt": "x", "n": 0}', 400, "n: got 0"),
        ("completions", '{"prompt": "x", "best_of": 2}', 400, "best_of: got 2, and n is 1"),
        ("completions", '{"prompt": "x", "logit_bias": {"5": 1}}', 400, "logit_bias: not supported"),
        ("completions", '{"prompt": "x", "model": "gpt-9"}', 404, "'gpt-9' is not served here"),
        ("completions", json.dumps({"prompt": "x = 1\n" * 200}), 400, "together fit 128"),
        ("completions", '{"prompt": "x", "max_tokens": 500}', 400, "at most"),
        ("chat/completions", '{"messages": [{"content": "x"}]}', 400, "each with a role"),
        ("chat/completions", '{"messages": [{"role": "tool", "content": "x"}]}', 400, "no tools here"),
        ("chat/completions", '{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', 400, "knows no tools"),
        ("chat/completions", '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', 400, "from 1 up"),
        ("responses", "{}", 404, "no such path"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(
    server: Running, path: str, body: str, status: int, reason: str
) -> None:
    given, answer = server.send("POST", f"/v1/{path}", body)
    assert given == status and reason in answer["error"]["message"]


def test_what_transformers_offers_besides_is_out_of_reach(server: Running) -> None:
    for path in ("/reset", "/load_model", "/docs", "/openapi.json"):
        assert server.send("POST", path, "{}")[0] == 404
    assert server.send("POST", "/health")[0] == 405


def test_a_client_that_leaves_stops_its_answer_and_nobody_elses(server: Running, greedy: Any) -> None:
    stream = server.client().completions.create(
        model=server.model, prompt="a", max_tokens=120, temperature=2, stream=True
    )
    next(iter(stream))
    stream.close()
    done = server.client().completions.create(model=server.model, prompt="b", max_tokens=4)
    assert done.choices[0].text == greedy("b", 4)
    deadline = time.monotonic() + 20
    while server.send("GET", "/health")[1]["running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.send("GET", "/health") == (200, {"status": "ok", "running": 0})


def test_sigterm_while_generating_ends_every_answer_and_exits_0(started: Callable[..., Running]) -> None:
    server = started("builtin")  # it has no chat template
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        server.client().chat.completions.create(model="builtin", messages=[{"role": "user", "content": "x"}])
    options: dict[str, Any] = {"model": "builtin", "prompt": "def ", "max_tokens": 500, "temperature": 2, "n": 8}
    stream = server.client().completions.create(**options, stream=True)
    next(iter(stream))
    with ThreadPoolExecutor(1) as threads:
        whole = threads.submit(server.client().completions.create, **options)
        while server.send("GET", "/health")[1]["running"] <= 8 and not whole.done():
            time.sleep(0.02)
        code, out, err = end(server, signal.SIGTERM)
        with pytest.raises(openai.APIError):
            whole.result()
    with pytest.raises(openai.APIError):
        list(stream)
    assert (code, out, err) == (0, "", "")


@pytest.mark.slow
def test_ctrl_c_ends_an_idle_server(started: Callable[..., Running], packed: Path) -> None:
    assert end(started(str(packed)), signal.SIGINT) == (0, "", "")


@pytest.mark.slow
def test_a_pruned_folder_is_packed_for_a_named_backend(started: Callable[..., Running], packed: Path) -> None:
    pruned = started(str(packed.with_name("pruned")), "--backend", "dense-lowmem")
    done = pruned.client().completions.create(model=pruned.model, prompt="def main(", max_tokens=4)
    assert done.usage is not None and done.usage.completion_tokens <= 4


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["serve", *arguments])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return code, err


def test_a_port_in_use_is_said_before_the_model_is_read(capsys: pytest.CaptureFixture[str], packed: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = failed(capsys, str(packed), "--port", str(port))
    assert code == 3 and f"port {port} of 127.0.0.1 is in use" in err


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], packed: Path) -> None:
    assert failed(capsys, "./nowhere")[0] == 2
    assert failed(capsys, str(packed), "--host", "no.such.host.invalid")[0] == 2
    code, err = failed(capsys, str(packed), "--backend", "mma42")
    assert code == 2 and "did you mean 'mma24'?" in err


def test_without_the_extra_it_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, packed: Path
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    code, err = failed(capsys, str(packed))
    assert code == 3 and "pip install 'llmsparse[serve]'" in err
