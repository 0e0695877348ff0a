"""The README's commands and code do what they say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from llmsparse.cli.app import main
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.sparsity.patterns import NofM, Unstructured

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^llmsparse .*$", README, flags=re.MULTILINE)
SMALLER = ["calibration_samples=4", "seq_len=32", "match_steps=2"]  # the same commands, on less text


@pytest.fixture
def folder(tiny_llama: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the README takes for granted: ./my-model, notes.txt, other.txt and a program of the reader's."""
    tiny_llama(tmp_path / "my-model")
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    (tmp_path / "other.txt").write_text(text[20_000:30_000], encoding="utf-8")
    (tmp_path / "my_evaluation.py").write_text(
        "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_one_after_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) >= 15
    for command in COMMANDS:
        arguments = shlex.split(command, comments=True)[1:]
        if arguments[0] == "serve":
            with serving(arguments) as address, urlopen(f"{address}/health", timeout=30) as answer:
                assert json.load(answer)["status"] == "ok", command
            continue
        if arguments[0] in ("prune", "plan"):
            arguments += SMALLER
        if arguments[0] == "factorize":
            arguments += ["calibration_samples=4", "seq_len=32", "router_steps=2"]
        if arguments[0] == "tune":
            arguments += ["steps=2", "seq_len=32"]
        assert main(arguments) == (3 if "meta-llama" in command else 0), (command, capsys.readouterr().err)


@contextmanager
def serving(arguments: list[str]) -> Generator[str, None, None]:
    """The address of a server started in this way, on a port that is free."""
    arguments[arguments.index("--port") + 1] = "0"
    with subprocess.Popen(
        [sys.executable, "-m", "llmsparse", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            found = (re.search(r"http://[\d.]+:\d+", line) for line in process.stdout)
            yield next(match[0] for match in found if match)
        finally:
            process.terminate()


def test_the_python_examples_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 4
    run = ["--calibration", "notes.txt", *SMALLER]
    assert main(["prune", "my-model", "-o", "my-model-2of4", "--pattern", "2:4", *run]) == 0
    assert main(["prune", "my-model", "-o", "my-model-70", "--sparsity", "70%", *run]) == 0
    assert main(["pack", "my-model-70", "-o", "my-model-70-packed"]) == 0
    capsys.readouterr()
    for example in examples:
        smaller = example.replace('calibration="notes.txt")', 'calibration="notes.txt", seq_len=32, match_steps=0)')
        if "openai" not in example:
            exec(compile(smaller, "README.md", "exec"), {})
            continue
        shown = len(capsys.readouterr().out)
        with serving(["serve", "my-model-70-packed", "--port", "8000"]) as address:
            exec(compile(example.replace("http://127.0.0.1:8000", address), "README.md", "exec"), {})
        assert shown and len(capsys.readouterr().out) > 1, "an answer"
    assert re.search(r"0\.5 \d+\.\d+", capsys.readouterr().out)
    assert (folder / "my-model-70-packed-too" / "model.safetensors").exists()


def test_the_rules_are_those_that_the_comments_say(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "rules.yaml").write_text(example)
    recipe = PruneRecipe.load(tmp_path / "rules.yaml", {"model": "m"})
    assert recipe.pattern_for("a.up_proj") == NofM(2, 4) and recipe.method_for("a.up_proj") == "sparsegpt"
    assert recipe.pattern_for("a.down_proj") == Unstructured(0.7, "row") and recipe.method_for("a.down_proj") == "alps"


def test_every_flag_the_readme_names_exists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    flags = set(re.findall(r"`(--[a-z-]+)", README))
    assert len(flags) > 8
    for verb in ("prune", "eval", "pack", "factorize", "serve", "quantize"):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert not {flag for flag in flags if flag not in shown}


def test_the_tree_has_a_line_for_every_room() -> None:
    package = Path(__file__).parents[1] / "llmsparse"
    rooms = [path.parent.name for path in package.glob("*/__init__.py")]
    tree = README[README.index("## Inside") :]
    assert len(rooms) > 10
    assert not [room for room in rooms if not re.search(rf"(^| ){room}/ +\S", tree, flags=re.MULTILINE)]
