"""`serve` says what `generate` says of the same folder, whatever its generation_config.json asks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_process import Running

from llmsparse.cli.app import main

PROMPT = "def __init__(self, "


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"repetition_penalty": 1.5},
        pytest.param({"no_repeat_ngram_size": 2, "min_new_tokens": 20}, marks=pytest.mark.slow),
        pytest.param({"do_sample": True, "temperature": 0.7, "min_p": 0.1, "top_k": 20}, marks=pytest.mark.slow),
        pytest.param({"eos_token_id": [1, 200, 201, 202]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_same_text_from_both(
    asked: dict[str, Any],
    builtin_with: Callable[..., Path],
    started: Callable[..., Running],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(builtin_with(**asked))
    for dtype in ("float32", "bfloat16"):
        arguments = ["--prompt", PROMPT, "--max-new-tokens", "24", "--dtype", dtype, "--json"]
        assert main(["generate", folder, *arguments]) == 0
        generated = json.loads(capsys.readouterr().out)
        server = started(folder, "--dtype", dtype)
        status, answer = server.ask(prompt=PROMPT, max_tokens=24, temperature=0)
        assert status == 200 and answer["choices"][0]["text"] == generated["text"]
        assert answer["usage"]["completion_tokens"] == generated["new_tokens"]
        server.close()


def test_a_model_that_samples_does_unless_it_is_told_not_to(
    builtin_with: Callable[..., Path], started: Callable[..., Running]
) -> None:
    server = started(str(builtin_with(do_sample=True, temperature=1.8, num_beams=3, stop_strings=["return"])))
    assert server.said == ["generation_config.json asks for num_beams=3, which serve cannot do"]
    drawn = {server.complete("def ", max_tokens=12)[0]["text"] for _ in range(4)}
    greedy = {server.complete("def ", max_tokens=12, temperature=0)[0]["text"] for _ in range(4)}
    assert len(drawn) > 1 and len(greedy) == 1
    assert "return" not in server.complete("def f(x):\n    ", max_tokens=60, temperature=0)[0]["text"]
