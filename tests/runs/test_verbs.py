"""A verb is one small package: what it brings is its own, and the frame gives it plan, resume, progress, report, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sign_verb
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

import llmsparse
from llmsparse.cli.recipe_verbs import add_recipe_verb
from llmsparse.cli.terminal import Terminal
from llmsparse.errors import LlmsparseError
from llmsparse.runs.progress import Silent
from llmsparse.runs.verbs import VERBS, Verb

SMALL = {"calibration_samples": 4, "seq_len": 16, "device": "cpu"}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (f"sign_verb:{name}" for name in ("SignRecipe", "make_plan", "sign"))
    monkeypatch.setitem(VERBS, "sign", Verb("sign_verb", *parts))


@pytest.fixture
def given(tiny_llama: Callable[..., Path], tmp_path: Path, text: str) -> dict[str, Any]:
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    model = tiny_llama(tmp_path / "model", layers=3)
    return {"model": str(model), "calibration": str(tmp_path / "notes.txt"), **SMALL}


def test_every_verb_of_the_table_has_all_its_parts() -> None:
    for name, verb in VERBS.items():
        recipe = verb.load_recipe()
        keys = {key for group in verb.keys.values() for key in group}
        assert keys == recipe.model_fields.keys() - {"model", "rules"}, name
        assert callable(verb.load_make_plan()) and callable(verb.load_run()) and verb.help and "=" in verb.example


def test_same_bytes_are_promised_on_a_cpu_alone() -> None:
    """On a GPU the backward pass of matching may sum in another order each time."""
    for name, verb in VERBS.items():
        if name == "sign":
            continue
        keys = {key: value for group in verb.keys.values() for key, value in group.items()}
        assert "on a CPU" in keys["seed"].help, name
        assert "on a CPU to the same bytes" in " ".join((verb.load_run().__doc__ or "").split()), name


def test_a_toy_verb_takes_fewer_than_60_lines() -> None:
    lines = Path(sign_verb.__file__).read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line and not line.startswith(("from ", '"""'))]) < 60


def test_it_plans_and_writes_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    plan = llmsparse.plan(sign_verb.SignRecipe(output=str(tmp_path / "out"), **given))
    assert plan.to_json()["bytes_to_write"] == plan.reader.nbytes and "signs" in plan.rows(plan.to_json())
    assert not list(tmp_path.glob("out*"))


def test_it_runs_and_says_what_it_did(given: dict[str, Any], tmp_path: Path) -> None:
    report = sign_verb.sign(sign_verb.SignRecipe(output=str(tmp_path / "out"), **given))
    made = load_file(tmp_path / "out" / "model.safetensors")
    weight = made["model.layers.1.mlp.up_proj.weight"]
    assert weight.abs().unique().numel() == 1, "signs times one mean"
    assert made["model.norm.weight"].unique().numel() == 1, "copied"
    assert report.perplexity["after"] != report.perplexity["before"] and report.warnings
    assert json.loads((tmp_path / "out" / "llmsparse_report.json").read_text())["perplexity"] == report.perplexity


class StopAfter(Silent):
    """A progress that breaks off when the block of this number is announced."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.left, self.seen = blocks, list[str]()

    def block(self, name: str) -> None:
        self.seen.append(name)
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_it_is_resumed_to_the_same_bytes(
    given: dict[str, Any], tmp_path: Path, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = (sign_verb.SignRecipe(output=str(tmp_path / name), **given) for name in ("whole", "parted"))
    sign_verb.sign(whole)
    with pytest.raises(KeyboardInterrupt):
        sign_verb.sign(parted, progress=StopAfter(blocks))
    assert not (tmp_path / "parted").exists()
    journal = (tmp_path / "parted.partial" / ".llmsparse" / "journal.jsonl").read_text().splitlines()
    assert len(journal) == 1 + blocks, "what was finished before the interruption is noted, and nothing else"
    with pytest.raises(LlmsparseError, match="--resume"):
        sign_verb.sign(parted)
    watched, made, own = StopAfter(99), list[str](), sign_verb.signed
    monkeypatch.setattr(sign_verb, "signed", lambda block: made.append(block.name) or own(block))
    sign_verb.sign(parted, resume=True, progress=watched)
    assert made == [f"model.layers.{n}" for n in range(blocks, 3)], "what was finished is read back, not made again"
    assert watched.seen == [f"model.layers.{n}" for n in range(3)]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parted"))
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def test_it_is_a_command_with_a_flag_for_each_key(given: dict[str, Any], tmp_path: Path) -> None:
    app = typer.Typer()
    add_recipe_verb(app, "sign")
    app.command("other")(lambda: None)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["sign", *arguments], obj=Terminal([]))

    flags = ["--calibration", given["calibration"], "--seq-len", "16", "--calibration-samples", "4", "--device", "cpu"]
    out = tmp_path / "out"
    assert "--calibration-samples" in run("--help").output
    planned = run(given["model"], *flags, "-o", str(out), "--dry-run", "--json")
    assert planned.exit_code == 0 and not out.exists()
    assert run(given["model"], *flags, "-o", str(out)).exit_code == 0 and out.is_dir()
    for wrong in ("sede=1", "seed=-1", "seed=yes"):
        refused = run(given["model"], *flags, "-o", str(tmp_path / "other"), wrong)
        assert isinstance(refused.exception, LlmsparseError) and "\n" not in str(refused.exception)
    assert not list(tmp_path.glob("other*"))
