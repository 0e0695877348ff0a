"""`scores` as a user runs it: one file of one model's experts, for any number of them and any blend of its texts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import RecipeError
from llmsparse.runs.progress import Silent
from llmsparse.scoring.file import FIELDS, ScoresFile
from llmsparse.scoring.plan import make_plan
from llmsparse.scoring.recipe import ScoresRecipe
from tests.shrinking.mixtures import save_mixture, save_texts

SMALL: dict[str, Any] = {"calibration_samples": 16, "seq_len": 32, "batch_size": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("mixture") / "model", tokenizer_folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, text: str) -> list[str]:
    return list(map(str, save_texts(tmp_path_factory.mktemp("texts"), text)))


@pytest.fixture(scope="module")
def scores(model: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    llmsparse.scores(model, output=file, calibration=texts, **SMALL)
    return file


class Stopped(Silent):
    """Ctrl-C as the last of `blocks` blocks begins."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def block(self, name: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_the_file_is_a_safetensors_file_that_says_what_it_is_of(scores: Path, texts: list[str]) -> None:
    assert sorted(path.name for path in scores.parent.iterdir()) == ["scores.safetensors"]
    with safe_open(scores, "pt") as file:
        header = json.loads(file.metadata()["scores"])
        assert len(list(file.keys())) == 3 * 2 * (len(FIELDS) + 1)
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float64}
        assert file.metadata()["format"] == "llmsparse scores 1"
    assert header["model"] == "model" and header["texts"] == {"prose.txt": 1.0, "numbers.jsonl": 1.0}
    assert header["experts"] == {f"model.layers.{index}": 8 for index in range(3)}
    assert header["described"]["recipe"]["calibration_samples"] == 16
    found = ScoresFile(scores).statistics("model.layers.1")
    for sums in found.values():
        assert sums.seen == 8 * 32 and sums.tokens.sum() == 2 * sums.seen
        assert torch.allclose(sums.pairs, sums.pairs.T)


@pytest.mark.parametrize(("experts", "score"), [(6, "hope"), ("25%", "reap"), ("50%", "frequency")])
def test_scores_measured_once_choose_as_a_run_in_one_pass_does(
    score: str, experts: Any, model: Path, texts: list[str], scores: Path, tmp_path: Path
) -> None:
    keys = {"experts": experts, "score": score, "refit": False, "calibration": texts} | SMALL
    llmsparse.shrink(model, output=tmp_path / "once", one_pass=True, **keys)
    llmsparse.shrink(model, output=tmp_path / "stored", scores=scores, **keys)
    for shard in (tmp_path / "once").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "stored" / shard.name).read_bytes()


def test_a_blend_is_what_its_texts_say(model: Path, texts: list[str], scores: Path, tmp_path: Path) -> None:
    def kept(number: int, *blend: str) -> list[list[int]]:
        report = llmsparse.shrink(
            model, output=tmp_path / str(number), experts=3, score="frequency", refit=False, calibration=texts[0],
            scores=scores, blend=blend, **SMALL,
        )  # fmt: skip
        return [block.rows["experts"]["kept"] for block in report.blocks]

    found = {
        text: [ScoresFile(scores).statistics(f"model.layers.{n}")[text] for n in range(3)]
        for text in ("prose.txt", "numbers.jsonl")
    }
    for number, text in enumerate(found):
        assert kept(number, text) == [
            sorted(sums.tokens.argsort(descending=True, stable=True)[:3].tolist()) for sums in found[text]
        ]
    assert kept(2, "prose.txt@1", "numbers.jsonl@1000") == kept(3, "numbers.jsonl@3")
    assert kept(4) == kept(5, "prose.txt", "numbers.jsonl@1")


def test_an_interrupted_measurement_goes_on_to_the_same_bytes(
    model: Path, texts: list[str], scores: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.safetensors"
    with pytest.raises(KeyboardInterrupt):
        llmsparse.scores(model, output=out, calibration=texts, progress=Stopped(3), **SMALL)
    assert not out.exists() and (tmp_path / "scores.safetensors.partial").is_dir()
    with pytest.raises(RecipeError, match="an unfinished run is there; go on with --resume"):
        llmsparse.scores(model, output=out, calibration=texts, **SMALL)
    llmsparse.scores(model, output=out, calibration=texts, resume=True, **SMALL)
    assert out.read_bytes() == scores.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.safetensors"]


@pytest.mark.slow
def test_a_killed_measurement_goes_on_to_the_same_bytes(
    model: Path, texts: list[str], scores: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.safetensors"
    named = [option for text in texts for option in ("--calibration", text)]
    small = [f"{key}={value}" for key, value in SMALL.items()]
    command = [sys.executable, "-m", "llmsparse", "scores", str(model), *small, *named, "-o", str(out), "-q"]
    journal = tmp_path / "scores.safetensors.partial" / ".llmsparse" / "journal.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert out.exists() or subprocess.run([*command, "--resume"], capture_output=True).returncode == 0
    assert out.read_bytes() == scores.read_bytes()


def test_the_command_line_says_what_it_measured(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.safetensors"
    small = [f"{key}={value}" for key, value in SMALL.items()]
    command = ["scores", str(model), *small, "--calibration", texts[0], "-o", str(out)]
    assert main([*command, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())  # lines break where the folder's name makes them too long
    assert "3 of them with 8 routed experts" in said and not out.exists()
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [block["experts"] for block in report["blocks"]] == [8, 8, 8] and report["texts"] == {"prose.txt": 1.0}
    assert main(command) == 2
    assert "exists already; choose another output, or replace it with --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert "8 in each of 3 layers" in capsys.readouterr().out


def test_only_what_was_written_by_it_is_replaced(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.safetensors").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    for name in ("notes.safetensors", "folder"):
        out = tmp_path / name
        assert (
            main(["scores", str(model), "--calibration", texts[0], "--seq-len", "32", "-o", str(out), "--overwrite"])
            == 2
        )
        error = capsys.readouterr().err
        assert "no file that llmsparse wrote, so --overwrite will not replace it" in error and error.count("\n") == 1
    assert (tmp_path / "notes.safetensors").read_text() == "mine"


def test_a_checkpoint_is_not_written_over_scores(model: Path, texts: list[str], scores: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a checkpoint, so --overwrite will not replace it"):
        llmsparse.shrink(model, output=scores, experts=4, calibration=texts[0], overwrite=True, **SMALL)
    assert scores.is_file()


def test_scores_of_another_model_are_refused(
    texts: list[str], scores: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    retrained = save_mixture(tmp_path / "retrained", tokenizer_folder)
    for weights in retrained.glob("model-*.safetensors"):
        save_file({key: tensor * 1.5 for key, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    wider = save_mixture(tmp_path / "wider", tokenizer_folder, num_experts=12)
    keys = {"experts": 4, "scores": scores, "calibration": texts[0]} | SMALL
    with pytest.raises(
        RecipeError, match=r"of model, which has 8 experts in 3 layers; this model has 12 experts in 3 layers"
    ):
        llmsparse.shrink(wider, output=tmp_path / "out", **keys)
    with pytest.raises(RecipeError, match=r"of model, whose routers are others than this model's; measure it with"):
        llmsparse.shrink(retrained, output=tmp_path / "out", **keys)
    assert not list(tmp_path.glob("out*"))


FIRST = "model.layers.0/0/"


def shrink_by(scores: Path, model: Path, texts: list[str]) -> None:
    """Into `out` beside the scores."""
    llmsparse.shrink(model, output=scores.with_name("out"), experts=4, calibration=texts, scores=scores, **SMALL)


@pytest.mark.parametrize(
    ("field", "damage"),
    [
        ("pairs", lambda sums: sums * torch.nan),
        ("additions", lambda sums: sums + torch.inf),
        ("outputs", lambda sums: -sums),
        ("tokens", lambda sums: -sums),
        ("seen", lambda sums: sums * torch.nan),
    ],
)
def test_sums_that_cannot_be_are_refused_before_anything_is_written(
    field: str,
    damage: Callable[[torch.Tensor], torch.Tensor],
    model: Path,
    texts: list[str],
    scores: Path,
    tmp_path: Path,
) -> None:
    with safe_open(scores, "pt") as file:
        metadata = file.metadata()
    sums = load_file(scores)
    sums[FIRST + field] = damage(sums[FIRST + field])
    save_file(sums, tmp_path / "scores.safetensors", metadata)
    with pytest.raises(RecipeError, match=f"no scores of experts \\({FIRST}{field} is no sum over tokens\\)"):
        shrink_by(tmp_path / "scores.safetensors", model, texts)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        {"texts": {"prose.txt": 10**400, "numbers.jsonl": 1.0}},
        {"texts": {"prose.txt": float("nan"), "numbers.jsonl": 1.0}},
        {"texts": {"prose.txt": -1.0, "numbers.jsonl": 1.0}},
        {"texts": {"prose.txt": "1", "numbers.jsonl": 1.0}},
        {"routers": []},
        {"experts": {f"model.layers.{index}": 8.0 for index in range(3)}},
        {"described": 3},
        {"model": None},
    ],
)
def test_a_header_that_cannot_be_is_refused(
    damage: dict[str, Any], model: Path, texts: list[str], scores: Path, tmp_path: Path
) -> None:
    with safe_open(scores, "pt") as file:
        metadata = file.metadata()
    header = json.dumps(json.loads(metadata["scores"]) | damage)
    save_file(load_file(scores), tmp_path / "scores.safetensors", metadata | {"scores": header})
    with pytest.raises(RecipeError, match="its header is not what"):
        shrink_by(tmp_path / "scores.safetensors", model, texts)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "truncated"),
        (b"no tensors at all", "truncated"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "its header is not what"),
    ],
)
def test_a_file_that_holds_no_scores_is_refused(
    content: bytes, why: str, model: Path, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "scores.safetensors").write_bytes(content)
    with pytest.raises(RecipeError, match="no scores of experts") as error:
        llmsparse.shrink(
            model,
            output=tmp_path / "out",
            experts=4,
            scores=tmp_path / "scores.safetensors",
            calibration=texts[0],
            **SMALL,
        )
    assert why in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


@pytest.mark.parametrize("blend", ["poems.txt@2", "prose.txt@0", "prose.txt@much"])
def test_a_blend_of_other_texts_is_refused(
    blend: str, model: Path, texts: list[str], scores: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="--blend"):
        llmsparse.shrink(
            model, output=tmp_path / "out", experts=4, scores=scores, blend=blend, calibration=texts[0], **SMALL
        )
    assert not list(tmp_path.iterdir())


def test_a_dense_model_has_nothing_to_measure(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scores", "builtin", "--calibration", texts[0], "--seq-len", "32", "-o", str(tmp_path / "out")]) == 2
    assert "has no routed experts; there is nothing to measure" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_scores_file_names_no_home_folder(
    model: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text(Path(texts[0]).read_text())
    llmsparse.scores(model, output=tmp_path / "s.safetensors", calibration=str(tmp_path / "mine.txt"), **SMALL)
    assert str(tmp_path).encode() not in (tmp_path / "s.safetensors").read_bytes()


def test_experts_are_watched_in_batches_that_they_can_share_out(
    model: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsparse.runs.device.ROUTED_TOKENS", 3 * 32)
    keys = SMALL | {"batch_size": None, "calibration": texts}
    recipe = ScoresRecipe(model=str(model), output=str(tmp_path / "scores.safetensors"), **keys)
    assert [len(batch) for batch in make_plan(recipe).batches] == [3, 3, 3, 3, 3, 1]
