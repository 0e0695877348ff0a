"""Runs that are repeated from what they wrote, or resumed: what must be the same, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from architectures import random_model, tiny_config
from safetensors.torch import load_file, save_file

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import MachineError, RecipeError
from llmsparse.factorization import plan as factor_planning
from llmsparse.factorization.recipe import FactorizeRecipe
from llmsparse.models.origin import config_fingerprint
from llmsparse.pruning import plan as planning
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.runs.partial import held_bytes
from llmsparse.runs.progress import Silent

SMALL = ["--calibration-samples", "6"]
EXPERTS = ["--experts", "4", "--shared", "1", "--active", "1", "--router-steps", "5"]
VERBS = {
    "prune": ["prune", "--sparsity", "0.5", "--method", "wanda", "method.name=wanda", *SMALL],
    "factorize": ["factorize", *EXPERTS, "router_steps=5", *SMALL],
}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", layers=2, dtype=torch.bfloat16)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    """A current folder with notes.txt and other.txt."""
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    (tmp_path / "other.txt").write_text(text[20_000:30_000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Stopped(Silent):
    """Ctrl-C as the second block begins."""

    def block(self, name: str) -> None:
        if name.endswith("1"):
            raise KeyboardInterrupt


def stop(verb: str, model: Path, here: Path) -> Callable[[], object]:
    """Stop a run after its first block; how to resume it."""
    keys: dict[str, Any] = {"model": model, "output": "out", "calibration": "notes.txt", "calibration_samples": 6}
    keys |= {"seq_len": 32}
    keys |= {"experts": 4, "shared": 1, "active": 1, "router_steps": 5} if verb == "factorize" else {}
    keys |= {"sparsity": 0.5, "match_steps": 0} if verb == "prune" else {}
    run = getattr(llmsparse, verb)
    with pytest.raises(KeyboardInterrupt):
        run(**keys, progress=Stopped())
    return lambda: run(**keys, resume=True)


@pytest.mark.parametrize("verb", VERBS)
def test_the_written_recipe_says_what_was_decided_and_gives_the_same_bytes(verb: str, model: Path, here: Path) -> None:
    name, *options = VERBS[verb]
    options += ["--match-steps", "10"] if verb == "prune" else []
    assert main([name, str(model), "-o", "out", "--calibration", "notes.txt", *options]) == 0
    written = yaml.safe_load((here / "out/llmsparse_recipe.yaml").read_text())
    decided = {"device": "cpu", "dtype": "float32", "seq_len": 128}
    decided |= {"container": "glm4_moe"} if verb == "factorize" else {}
    assert written | decided == written and written["batch_size"] >= 1
    assert main([name, "--recipe", "out/llmsparse_recipe.yaml", "-o", "again"]) == 0
    assert (here / "out/model.safetensors").read_bytes() == (here / "again/model.safetensors").read_bytes()
    reports = [json.loads((here / run / "llmsparse_report.json").read_text()) for run in ("out", "again")]
    assert reports[0]["perplexity"] == reports[1]["perplexity"]


def test_the_resolved_recipe_says_how_long_is_matched(model: Path, here: Path) -> None:
    plan = llmsparse.plan(model, sparsity=0.5, calibration="notes.txt", calibration_samples=6)
    assert plan.recipe.match_steps == "auto" and plan.resolved.match_steps == plan.match_steps == 200


def test_an_assignment_may_stand_first_where_the_recipe_names_the_model(model: Path, here: Path) -> None:
    (here / "mine.yaml").write_text(f"model: {model}\nsparsity: 0.5\ncalibration: notes.txt\nmatch_steps: 0\n")
    (here / "odd=name").mkdir()
    assert main(["plan", "--recipe", "mine.yaml", "sparsity=0.6"]) == 0
    assert main(["plan", "odd=name", "--recipe", "mine.yaml"]) == 2  # a folder of that name is a model


@pytest.mark.parametrize("verb", VERBS)
def test_a_journal_without_checksums_is_refused_in_one_line(verb: str, model: Path, here: Path) -> None:
    resume = stop(verb, model, here)
    journal = here / "out.partial/.llmsparse/journal.jsonl"
    notes = [json.loads(line) for line in journal.read_text().splitlines()]
    for note in notes:
        note["entry"].pop("checksums", None)
    journal.write_text("".join(json.dumps(note) + "\n" for note in notes))
    with pytest.raises(RecipeError, match=r"another version .*layers\.0 .*start again with --overwrite") as error:
        resume()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("verb", VERBS)
def test_a_resume_with_an_edited_config_is_refused(verb: str, tiny_llama: Callable[..., Path], here: Path) -> None:
    model = tiny_llama(here / "mine", layers=2)
    resume = stop(verb, model, here)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(RecipeError, match="cannot be resumed, changed since it was started: model"):
        resume()


def test_code_counts_only_where_it_is_run(tmp_path: Path) -> None:
    for name in ("config.json", "modeling_mine.py", "notes.txt"):
        (tmp_path / name).write_text(name)
    assert list(config_fingerprint(tmp_path)) == ["config.json"]
    before = config_fingerprint(tmp_path, trust_remote_code=True)
    assert list(before) == ["config.json", "modeling_mine.py"]
    (tmp_path / "modeling_mine.py").write_text("changed")
    assert config_fingerprint(tmp_path, trust_remote_code=True) != before


@pytest.mark.parametrize("verb", VERBS)
def test_the_room_of_an_unfinished_run_is_not_asked_for_twice(
    verb: str, model: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that the unfinished run has filled but for less than it holds."""
    stop(verb, model, here)
    plan = prune_plan if verb == "prune" else factor_plan
    held = held_bytes(here / "out")
    needed = plan(model, resume=True).to_json()["bytes_to_write"]
    monkeypatch.setattr(
        "llmsparse.storage.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=10**6 + needed - held // 2)
    )
    for how in ({"resume": True}, {"overwrite": True}):
        plan(model, **how)
    monkeypatch.setattr("llmsparse.storage.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(MachineError, match=r"elsewhere needs .* [kM]B and its disk has 1\.00 kB free"):
        plan(model, output="elsewhere")


def prune_plan(model: Path, output: str = "out", **how: bool) -> planning.Plan:
    keys = {"sparsity": 0.5, "match_steps": 0, "seq_len": 32, "calibration_samples": 6}
    return planning.make_plan(PruneRecipe(model=model, output=output, calibration="notes.txt", **keys), **how)


def factor_plan(model: Path, output: str = "out", **how: bool) -> factor_planning.FactorizePlan:
    keys = {"experts": 4, "shared": 1, "active": 1, "seq_len": 32, "calibration_samples": 6}
    return factor_planning.make_plan(
        FactorizeRecipe(model=model, output=output, calibration="notes.txt", **keys), **how
    )


def test_eval_on_the_calibration_text_warns_in_one_line(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["prune", str(model), "-o", "out", "--calibration", "notes.txt", "--match-steps", "0", "--seq-len", "32"]
    assert main([*run, *VERBS["prune"][1:]]) == 0
    (here / "copy").mkdir()
    (here / "copy/notes.txt").write_text((here / "other.txt").read_text())

    def warned(text: str, *more: str) -> str:
        capsys.readouterr()
        assert main(["eval", "out", "--text", text, "--seq-len", "32", "--windows", "2", *more]) == 0
        return capsys.readouterr().err

    assert (
        warned("notes.txt").startswith("warning: out was calibrated on notes.txt")
        and warned("notes.txt").count("\n") == 1
    )
    assert warned(str(here / "notes.txt")) and not warned("notes.txt", "--quiet")
    assert not warned("other.txt") and not warned("builtin")
    assert not warned("copy/notes.txt")  # another file of the same name
    (here / "notes.txt").rename(here / "moved.txt")
    assert warned("copy/notes.txt")  # it may be that one: what was named is gone


def test_tensors_without_dimensions_are_pruned_around_packed_and_unpacked(here: Path) -> None:
    """Apertus keeps numbers of its activation function as tensors of no dimension."""
    random_model(tiny_config("apertus")).save_pretrained(here / "model")
    before = load_file(here / "model/model.safetensors")
    scalars = {key for key, tensor in before.items() if tensor.dim() == 0}
    assert scalars
    ids = torch.randint(3, 97, (6, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, here / "ids.safetensors")
    keys: dict[str, Any] = {"method": "wanda", "sparsity": 0.7, "match_steps": 0, "calibration": "ids.safetensors"}
    llmsparse.prune("model", output="out", **keys)
    llmsparse.pack("out", "packed")
    llmsparse.unpack("packed", "back")
    after, back = load_file(here / "out/model.safetensors"), load_file(here / "back/model.safetensors")
    for key, tensor in before.items():
        assert after[key].shape == tensor.shape and torch.equal(after[key], back[key])
    assert all(torch.equal(before[key], after[key]) for key in scalars)
    assert llmsparse.inspect("out").sparsity > 0.3
