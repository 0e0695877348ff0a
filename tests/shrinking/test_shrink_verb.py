"""`shrink` as a user runs it: several texts, interrupted and killed runs, one step after the other, and bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import RecipeError
from llmsparse.runs.progress import Silent
from llmsparse.scoring.file import ScoresFile
from llmsparse.scoring.scores import choose
from llmsparse.scoring.statistics import blend
from llmsparse.shrinking.plan import make_plan
from llmsparse.shrinking.recipe import amount_of, parse_amount
from tests.shrinking.mixtures import files, save_mixture, save_texts

SMALL: dict[str, Any] = {"calibration_samples": 16, "seq_len": 32, "batch_size": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("mixture") / "model", tokenizer_folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, text: str) -> tuple[Path, Path]:
    return save_texts(tmp_path_factory.mktemp("texts"), text)


class Stopped(Silent):
    """Ctrl-C as the last of `blocks` blocks begins."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def block(self, name: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "how",
    [
        {"match_steps": 2},
        {"one_pass": True},
        {"one_pass": True, "refit": False, "score": "reap"},
        {"blocks": 2, "ffn": "75%", "score": ["hope", "influence"]},
    ],
    ids=["matched", "one pass", "one pass, not fitted", "with blocks and width"],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    how: dict[str, Any], model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    keys = {"model": model, "output": out, "experts": "50%", "calibration": str(texts[0])} | SMALL | how
    llmsparse.shrink(**keys)
    whole = files(out)
    for blocks in (2, 3) if "match_steps" in how else (3,):
        shutil.rmtree(out)
        with pytest.raises(KeyboardInterrupt):
            llmsparse.shrink(progress=Stopped(blocks), **keys)
        assert not out.exists()
        llmsparse.shrink(resume=True, **keys)
        assert files(out) == whole


@pytest.mark.slow
def test_a_run_killed_again_and_again_goes_on_to_the_same_bytes(
    model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--experts", "50%", "--calibration", str(texts[0]), "--match-steps", "4", "--device", "cpu"]
    options += ["--calibration-samples", "16", "--seq-len", "32", "--batch-size", "2"]
    command = [sys.executable, "-m", "llmsparse", "shrink", str(model), *options, "-o", str(out), "-q"]
    subprocess.run(command, check=True, capture_output=True)
    whole = files(out)
    shutil.rmtree(out)
    journal = tmp_path / "out.partial" / ".llmsparse" / "journal.jsonl"
    for lines in (1, 3):  # finished blocks, what is copied among them
        process = subprocess.Popen([*command, *(["--resume"] if journal.exists() else [])], stdout=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not out.exists():
        subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert files(out) == whole


def test_every_text_is_measured_by_itself_and_reported_worst_first(
    model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    report = llmsparse.shrink(
        model, output=tmp_path / "out", experts=4, calibration=[f"{texts[0]}@3", str(texts[1])], **SMALL
    )
    assert report.perplexity is not None
    sources = report.perplexity["sources"]
    assert {source["source"] for source in sources} == {"prose.txt", "numbers.jsonl"}
    ratios = [source["after"] / source["before"] for source in sources]
    assert ratios == sorted(ratios, reverse=True)


def test_weights_of_texts_decide_which_experts_stay(model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    keys = {"calibration": [f"{texts[0]}@3", f"{texts[1]}@1"], **SMALL}
    llmsparse.scores(model, output=tmp_path / "scores.safetensors", **keys)
    scores = ScoresFile(tmp_path / "scores.safetensors")
    report = llmsparse.shrink(model, output=tmp_path / "out", experts=3, one_pass=True, refit=False, **keys)
    for block in report.blocks:
        statistics = scores.statistics(block.name)
        assert (
            block.rows["experts"]["kept"]
            == choose(blend(statistics, {"prose.txt": 3, "numbers.jsonl": 1}), "hope", 3).kept
        )


def test_matching_brings_the_output_closer(model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    report = llmsparse.shrink(
        model, output=tmp_path / "out", experts=4, calibration=str(texts[0]), match_steps=12, **SMALL
    )
    matches = [block.match for block in report.blocks if block.match is not None]
    assert len(matches) == 3 and all(match["after"] <= match["before"] for match in matches)
    assert matches[0]["after"] < matches[0]["before"]
    assert "12 steps a block" in dict(report.findings())["matching"]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_it_composes_with_every_other_verb(model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    prose = str(texts[0])
    llmsparse.shrink(model, output=tmp_path / "less", experts=4, calibration=prose, **SMALL)
    llmsparse.shrink(tmp_path / "less", output=tmp_path / "lesser", experts=2, ffn="50%", calibration=prose, **SMALL)
    pruned = llmsparse.prune(
        tmp_path / "less",
        output=tmp_path / "sparse",
        pattern="2:4",
        method="wanda",
        match_steps=0,
        calibration=prose,
        **SMALL,
    )
    assert pruned.sparsity == 0.5
    llmsparse.pack(tmp_path / "sparse", tmp_path / "packed")
    plain = llmsparse.generate(str(tmp_path / "sparse"), "def ", max_new_tokens=8)
    packed = llmsparse.generate(str(tmp_path / "packed"), "def ", max_new_tokens=8)
    assert plain.text == packed.text


@pytest.mark.slow
def test_a_factorized_model_is_shrunk_and_tuned(
    tiny_llama: Callable[..., Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    dense, prose = tiny_llama(tmp_path / "dense"), str(texts[0])
    made: dict[str, Any] = {"experts": 8, "shared": 2, "active": 2, "router_steps": 20} | SMALL
    llmsparse.factorize(dense, output=tmp_path / "mixture", calibration=prose, **made)
    llmsparse.shrink(tmp_path / "mixture", output=tmp_path / "less", experts=4, calibration=prose, **SMALL)
    trained: dict[str, Any] = {"steps": 6, "seq_len": 32, "batch_size": 8, "device": "cpu"}
    llmsparse.tune(tmp_path / "less", output=tmp_path / "tuned", teacher=str(dense), text=prose, **trained)
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["n_routed_experts"] == 4


@pytest.mark.parametrize(("recipe", "left"), [("experts-75", 6), ("experts-50", 4)])
def test_shipped_recipes_take_experts_out(
    recipe: str, left: int, model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    command = ["shrink", str(model), "--recipe", recipe, "-o", str(tmp_path / "out"), "--calibration", str(texts[0])]
    small = [f"{key}={value}" for key, value in SMALL.items()]
    assert main([*command, *small]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").num_experts == left
    assert llmsparse.ShrinkRecipe.load(recipe, {"model": "org/name"}).output_folder.name == f"name-{recipe}"


def test_a_dry_run_says_what_stays_and_writes_nothing(
    model: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [
        "shrink",
        str(model),
        "--experts",
        "75%",
        "-o",
        str(out),
        "--calibration",
        str(texts[0]),
        "--seq-len",
        "32",
    ]
    assert main([*command, "--dry-run"]) == 0
    assert "6 of 8 routed experts stay in each of 3 layers, chosen by hope" in capsys.readouterr().out
    assert main([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["after"] < plan["parameters"]["before"]
    assert not list(tmp_path.iterdir())


def test_experts_are_watched_in_batches_that_they_can_share_out(
    model: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsparse.runs.device.ROUTED_TOKENS", 32)  # a window; others get as many as are held out from
    keys = SMALL | {"batch_size": None, "calibration": str(texts[0]), "output": str(tmp_path / "out")}
    sizes = {
        what: {
            len(batch)
            for batch in make_plan(llmsparse.ShrinkRecipe(model=str(model), **{what: amount}, **keys)).batches
        }
        for what, amount in (("experts", 5), ("blocks", 2))
    }
    assert sizes == {"experts": {1}, "blocks": {2}}


def test_what_a_plan_promises_is_what_is_written(model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    report = llmsparse.shrink(model, output=tmp_path / "out", experts=5, calibration=str(texts[0]), **SMALL)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report.parameters[1] == sum(parameter.numel() for parameter in made.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "9"], "--experts 9: there are 8; ask for fewer"),
        (["--experts", "0"], "--experts: got 0, wanted at least 1"),
        (["--experts", "100%"], "--experts: got 100%, wanted a share above 0% and below 100%"),
        (["--experts", "many"], "--experts: got 'many', wanted how much stays"),
        (["--experts", "1"], "--experts 1: 1 stay, but each token is sent to 2"),
        ([], "nothing says what to shrink"),
        (["--experts", "4", "--score", "best"], "--score: got"),
        (["--experts", "4", "--score", "suffix"], "suffix chooses blocks, which are not shrunk"),
        (
            ["--experts", "4", "--score", "hope", "--score", "reap"],
            "got hope and reap, wanted one way to choose experts",
        ),
        (["--blocks", "2", "--one-pass"], "is about experts, which are not shrunk"),
        (["--experts", "4", "--blend", "a@2"], "blends texts of --scores, which is not given"),
        (["--experts", "4", "--scores", "gone.safetensors"], "--scores gone.safetensors: no such file"),
        (["--experts", "4", "--scores", "scores.safetensors", "--one-pass"], "leave one out"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["shrink", str(model), "-o", str(out), "--calibration", "builtin", "--seq-len", "32", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_packed_source_is_refused(model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    llmsparse.prune(
        model, output=tmp_path / "packed", sparsity=0.7, method="magnitude", format="packed", match_steps=0,
        calibration=str(texts[0]), **SMALL,
    )  # fmt: skip
    with pytest.raises(llmsparse.CheckpointError, match="packed by llmsparse; restore it first: llmsparse unpack"):
        llmsparse.shrink(tmp_path / "packed", output=tmp_path / "out", experts=4, calibration=str(texts[0]), **SMALL)


@pytest.mark.parametrize(
    ("asked", "total", "step", "left"),
    [
        ("96", 128, 1, 96),
        ("75%", 128, 1, 96),
        (0.5, 9, 1, 5),
        ("33.3%", 6, 1, 2),
        ("1%", 8, 1, 1),
        ("60%", 12, 4, 8),
        (3, 8, 1, 3),
    ],
)
def test_an_amount_is_a_number_or_a_share(asked: Any, total: int, step: int, left: int) -> None:
    assert amount_of(parse_amount(asked), total, step) == left


@pytest.mark.parametrize("asked", ["0", "100%", "0%", "1.5", "-3", "half", True, "101%", ""])
def test_what_is_no_amount_is_refused(asked: Any) -> None:
    with pytest.raises(ValueError, match="got"):
        parse_amount(asked)
    with pytest.raises(RecipeError):
        llmsparse.ShrinkRecipe(model="org/name", experts=asked)


def test_seeds_decide_a_random_choice_and_nothing_else_does(
    model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    keys = {"experts": 4, "score": "random", "refit": False, "calibration": str(texts[0])} | SMALL
    kept = []
    for number, seed in enumerate([0, 0, 1]):
        report = llmsparse.shrink(model, output=tmp_path / str(number), seed=seed, **keys)
        kept.append([block.rows["experts"]["kept"] for block in report.blocks])
    assert kept[0] == kept[1] != kept[2]


def test_half_precision_is_shrunk_as_it_is_stored(
    tokenizer_folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    source = save_mixture(tmp_path / "model", tokenizer_folder)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    llmsparse.shrink(source, output=tmp_path / "out", experts=4, dtype="bfloat16", calibration=str(texts[0]), **SMALL)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
