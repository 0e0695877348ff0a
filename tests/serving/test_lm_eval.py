"""lm-evaluation-harness against `serve`: the figures of its own `--model hf`, and its requests in its own words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_process import KEY, Running

LM_EVAL = shutil.which("lm_eval")
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
LINES = [
    ("import os\nimport sys\nimport ", ["re", "\n\n", "zz zz", ")))"]),
    ("def __init__(self, ", ["name):", "=", "import", "\n\n\n"]),
    ("    return self", [".", "import", "\n    def", "?"]),
    ("for i in range(", ["len(", "class", "%%", "\n"]),
    ("if x is not ", ["None", "def", "==", "raise"]),
    ("class Error(", ["Exception", "1", "\n", "def"]),
    ("try:\n    import ", ["os", "(", "]", "="]),
    ("    raise ValueError(", ['"', "def", "\n", "class"]),
]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "said": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{said}}",
        "generation_kwargs": {"until": ["\n", "zz"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def likely(builtin_with: Callable[..., Path], started: Callable[..., Running]) -> Running:
    """The embedded model in float32, where the figures do not hang on rounding."""
    return started(str(builtin_with(TEMPLATE)), "--dtype", "float32")


@pytest.mark.slow
@pytest.mark.skipif(LM_EVAL is None, reason="lm_eval is not installed")
def test_the_figures_are_those_of_the_harness_own_model(likely: Running, tmp_path: Path) -> None:
    rows = list[dict[str, Any]]()
    for number, (text, choices) in enumerate(LINES):
        said = likely.complete(text, max_tokens=12, temperature=0, stop="\n")[0]["text"]
        rows.append({"text": text, "choices": choices, "said": said if number % 2 else "something else"})
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lines.jsonl")}}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    url, folder = f"http://127.0.0.1:{likely.port}/v1", likely.model
    served = f"model={folder},tokenizer={folder},max_length=512,add_bos_token=True"  # as --model hf has it
    own = figures(tmp_path, "hf", "choices,rolling,said", f"pretrained={folder},dtype=float32,max_length=511")
    ours = figures(tmp_path, "local-completions", "choices,rolling,said", f"{served},base_url={url}/completions")
    many = figures(
        tmp_path,
        "local-completions",
        "choices,said",
        f"{served},base_url={url}/completions,num_concurrent=4,tokenized_requests=False",
        "--batch_size",
        "2",
    )
    chat = figures(
        tmp_path, "local-chat-completions", "said", f"{served},base_url={url}/chat/completions", "--apply_chat_template"
    )
    assert own["said"]["exact_match,none"] == 0.5 and 0 < own["choices"]["acc,none"] < 1
    for name in ("choices", "said"):
        assert ours[name] == many[name] == own[name]
    assert chat["said"] == own["said"]
    assert ours["rolling"]["bits_per_byte,none"] == pytest.approx(own["rolling"]["bits_per_byte,none"], rel=1e-4)


def figures(folder: Path, model: str, tasks: str, arguments: str, *more: str) -> dict[str, dict[str, float]]:
    """Task → metric → figure, as lm_eval writes them."""
    out = folder / f"{model}-{len(list(folder.iterdir()))}"
    command = [
        str(LM_EVAL),
        "--model",
        model,
        "--model_args",
        arguments,
        "--tasks",
        tasks,
        "--include_path",
        str(folder),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [*command, "--output_path", str(out), "--device", "cpu", *more], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = out.rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    return {
        task: {key: value for key, value in found.items() if isinstance(value, float) and "stderr" not in key}
        for task, found in results.items()
    }


def test_its_requests_are_answered_in_its_own_words(trained: Running) -> None:
    """What 0.4.13 sends for loglikelihood, generate_until and a chat, and what it reads of the answers."""
    generation = {"max_tokens": 8, "temperature": 0, "stop": ["\n\n", "</s>"], "seed": 1234}
    (said,) = trained.complete([[5, 6, 7, 8]], model="builtin", **generation)
    assert said["index"] == 0 and isinstance(said["text"], str)
    likelihood = {"model": "builtin", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = trained.complete([[5, 6, 7, 8], [9, 10, 11]], **likelihood)
    for choice, (context, tokens) in zip(choices, ((2, 4), (1, 3)), strict=True):
        scores = choice["logprobs"]
        of_continuation = scores["token_logprobs"][context:-1]
        assert len(of_continuation) == tokens - context and all(one <= 0 for one in of_continuation)
        for one, best in zip(of_continuation, scores["top_logprobs"][context:-1], strict=True):
            assert one <= max(best.values())
    status, answer = trained.ask(
        "chat/completions", model="builtin", messages=[{"role": "user", "content": "x", "type": "text"}], **generation
    )
    assert status == 400 and "no chat template" in answer["error"]["message"]


def test_a_continuation_that_the_model_would_say_is_seen_as_greedy(trained: Running) -> None:
    (said,) = trained.complete([5, 6, 7], max_tokens=1, temperature=0, logprobs=1, echo=True)
    token = said["logprobs"]["top_logprobs"][-1]
    assert list(token.values()) == [said["logprobs"]["token_logprobs"][-1]]
