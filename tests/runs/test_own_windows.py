"""Calibration on what the model writes itself: cached, resumed, stored, repeated, and what it takes said beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import llmsparse
from llmsparse.cli.app import main
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.runs import own_windows
from llmsparse.runs.progress import Silent

KEYS: dict[str, Any] = {
    "sparsity": 0.6,
    "calibration": "self",
    "calibration_samples": 12,
    "seq_len": 24,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def here(tiny_llama: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "model", layers=3)
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    return tmp_path


def prune(output: str, *, progress: Silent | None = None, resume: bool = False, **keys: Any) -> Any:
    recipe = PruneRecipe(model="model", output=output, **{"match_steps": 4, **KEYS, **keys})
    return llmsparse.prune(recipe, progress=progress, resume=resume)


def tokens(folder: str) -> torch.Tensor:
    return load_file(Path(folder) / "calibration" / "self.safetensors")["input_ids"]


def weights(folder: str) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def test_what_the_model_wrote_is_stored_and_repeats_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = prune("out")
    assert tokens("out").shape == (12 + 32, 24) and bool((tokens("out")[:, 0] == 0).all())
    assert report.protocol["text"] == "written by the model itself" and report.perplexity["windows"] == 32
    assert json.loads(Path("out/llmsparse_report.json").read_text())["recipe"]["calibration"] == "self"
    written = yaml.safe_load(Path("out/llmsparse_recipe.yaml").read_text())
    assert written["calibration"] == "./calibration/self.safetensors"
    Path("else").mkdir()
    Path("out").rename("else/moved")
    monkeypatch.chdir("else")
    assert main(["prune", "../model", "--recipe", "moved/llmsparse_recipe.yaml", "-o", "again", "-q"]) == 0
    assert weights("again") == weights("moved")


def test_the_same_seed_writes_the_same_and_another_one_something_else() -> None:
    prune("one", match_steps=0)
    prune("two", match_steps=0)
    prune("three", match_steps=0, seed=1)
    assert weights("one") == weights("two") and torch.equal(tokens("one"), tokens("two"))
    assert not torch.equal(tokens("one"), tokens("three"))


class StopAt(Silent):
    """Breaks off when a stretch of work of this name is at its n-th step, or when a block of this number begins."""

    def __init__(self, stretch: str = "", steps: int = 0, blocks: int = 99) -> None:
        super().__init__()
        self.stretch, self.steps, self.left = stretch, steps, blocks
        self.begun = list[str]()

    def batches(self, description: str, total: int) -> Callable[[], None]:
        self.begun.append(description)

        def step() -> None:
            if self.stretch and description.startswith(self.stretch):
                self.steps -= 1
                if self.steps < 0:
                    raise KeyboardInterrupt

        return step

    def block(self, name: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [{"stretch": "writing", "steps": 5}, {"blocks": 0}, {"blocks": 2}])
def test_it_is_resumed_to_the_same_bytes_and_written_once(stop: dict[str, Any]) -> None:
    prune("whole", calibration=["self", "notes.txt"])
    with pytest.raises(KeyboardInterrupt):
        prune("parted", calibration=["self", "notes.txt"], progress=StopAt(**stop))
    watched = StopAt()
    prune("parted", calibration=["self", "notes.txt"], resume=True, progress=watched)
    assert weights("parted") == weights("whole") and torch.equal(tokens("parted"), tokens("whole"))
    assert ("writing windows" in watched.begun) == ("stretch" in stop)


def test_a_mix_of_both_reports_both() -> None:
    report = prune("out", calibration=["self", "notes.txt@2"])
    assert {one["source"] for one in report.perplexity["sources"]} == {"self", "notes.txt"}
    assert tokens("out").shape == (4 + 16, 24), "its share, and half of the held-out windows"
    written = yaml.safe_load(Path("out/llmsparse_recipe.yaml").read_text())
    assert written["calibration"] == ["./calibration/self.safetensors", "../notes.txt@2"]
    assert main(["prune", "model", "--recipe", "out/llmsparse_recipe.yaml", "-o", "again", "-q"]) == 0
    assert weights("again") == weights("out")


def test_a_packed_result_has_its_tokens_too() -> None:
    prune("out", format="packed", match_steps=0, sparsity=0.8)
    assert tokens("out").shape == (44, 24)


def test_a_factorization_takes_it_too() -> None:
    options = {"experts": 4, "shared": 1, "active": 1, "router_steps": 5, "calibration_samples": 16}
    own = {key: KEYS[key] for key in ("calibration", "seq_len", "device")}
    report = llmsparse.factorize("model", output="out", **options, **own)
    assert report.protocol["text"] == "written by the model itself" and tokens("out").shape == (48, 24)


def test_a_quantization_takes_it_too_and_repeats_it(here: Path) -> None:
    flags = ["--bits", "3", "--seq-len", "24", "--calibration-samples", "4", "-q"]
    assert main(["quantize", "model", "-o", "out", "--calibration", "self", *flags]) == 0
    assert tokens("out").shape == (4 + 32, 24)
    report = json.loads(Path("out/llmsparse_report.json").read_text())
    assert report["calibration"]["text"] == "written by the model itself" and report["perplexity"]["windows"] == 32
    assert main(["quantize", "--recipe", "out/llmsparse_recipe.yaml", "-o", "again", "-q"]) == 0
    assert weights("again") == weights("out")


def test_thresholds_take_it_too() -> None:
    own = {key: KEYS[key] for key in ("calibration", "seq_len", "device")}
    llmsparse.activations("model", output="out", sparsity=0.5, calibration_samples=4, **own)
    assert tokens("out").shape == (4 + 32, 24)


def test_a_plan_says_how_it_will_be_written_and_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = llmsparse.plan("model", **KEYS)
    found = plan.to_json()
    assert found["writing"] == {"windows": 44, "at_once": 44, "segment": None, "reads": 1} | {
        "memory_bytes": found["writing"]["memory_bytes"]
    }
    assert plan.windows.ids.is_meta and sorted(path.name for path in here.iterdir()) == ["model", "notes.txt"]
    monkeypatch.setattr(own_windows, "available_bytes", lambda device: 1000)  # pyright: ignore[reportUnknownLambdaType]
    streamed = llmsparse.plan("model", **KEYS)
    assert streamed.to_json()["writing"]["reads"] == own_windows.SEGMENT - 1
    assert "too large to be held whole" in streamed.writing.spell(10**9)


def test_a_model_too_large_to_be_held_whole_writes_in_segments_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_windows, "available_bytes", lambda device: 1000)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(own_windows, "SEGMENT", 10)
    said = list[str]()

    class Listening(Silent):
        def log(self, line: str) -> None:
            said.append(line)

    prune("out", match_steps=0, progress=Listening())
    assert tokens("out").shape == (44, 24) and any("in segments of 10 tokens" in line for line in said)
    for place in (0, 10, 20):
        assert bool((tokens("out")[:, place] == 0).all()), "each segment begins as a text does"


def test_a_model_that_cannot_start_is_refused_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (here / "model" / name).unlink(missing_ok=True)
    config = json.loads((here / "model" / "config.json").read_text())
    (here / "model" / "config.json").write_text(json.dumps(config | {"bos_token_id": None}))
    flags = ["--sparsity", "0.5", "--calibration", "self", "--seq-len", "16"]
    assert main(["prune", "model", "-o", "out", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert "has no way to start a text" in said and "\n" not in said and not list(here.glob("out*"))
    (here / "model" / "config.json").write_text(json.dumps(config))
    assert main(["prune", "model", "-o", "out", "--match-steps", "0", "calibration_samples=4", *flags, "-q"]) == 0


def test_where_c4_cannot_be_had_the_model_writes_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--sparsity", "0.5", "--match-steps", "0", "--seq-len", "16", "calibration_samples=4"]
    assert main(["plan", "model", *flags]) == 0
    planned = " ".join(capsys.readouterr().out.split())
    assert "written by the model itself" in planned and "c4 cannot be read offline, so the model writes" in planned
    assert main(["prune", "model", "-o", "out", *flags]) == 0
    assert "c4 cannot be read offline, so the model writes" in " ".join(capsys.readouterr().out.split())
    report = json.loads(Path("out/llmsparse_report.json").read_text())
    assert report["recipe"]["calibration"] == "self" and len(report["warnings"]) >= 1
    assert main(["prune", "model", "-o", "two", *flags, "--calibration", "self", "-q"]) == 0
    assert weights("out") == weights("two")


def test_without_c4_and_without_a_way_to_start_c4_is_what_is_missing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (here / "model" / name).unlink(missing_ok=True)
    config = json.loads((here / "model" / "config.json").read_text())
    (here / "model" / "config.json").write_text(json.dumps(config | {"bos_token_id": None}))
    assert main(["prune", "model", "-o", "out", "--sparsity", "0.5"]) == 3
    assert capsys.readouterr().err.startswith("error: c4 cannot be read offline: use --calibration builtin")


def test_no_one_evaluates_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "model", "--text", "self"]) == 2
    assert "self is for calibration alone" in capsys.readouterr().err
