"""`--permute auto` in a run: said beforehand and in the report, resumed to the same bytes, refused where it is for nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_random, tiny_config
from safetensors.torch import load_file, save_file
from test_reordering import original, reordered

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import LlmsparseError
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.runs.progress import Silent

KEYS: dict[str, Any] = {
    "method": "wanda", "pattern": "2:4", "match_steps": 0, "calibration": "notes.txt", "calibration_samples": 8,
    "seq_len": 32, "device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tiny_llama: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "model", layers=3)
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    return tmp_path


def prune(output: str = "out", *, progress: Silent | None = None, resume: bool = False, **keys: Any) -> Any:
    recipe = PruneRecipe(**{"model": "model", "output": output, "permute": "auto", **KEYS, **keys})
    return llmsparse.prune(recipe, progress=progress, resume=resume)


def weights(output: str) -> bytes:
    return Path(output, "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "dsnot", "sparsegpt", "alps"])
def test_every_method_keeps_the_pattern_in_the_new_order(method: str) -> None:
    report = prune(method=method)
    made, before = load_file("out/model.safetensors"), load_file("model/model.safetensors")
    assert {key: tensor.shape for key, tensor in made.items()} == {key: tensor.shape for key, tensor in before.items()}
    for row in report.rows:
        kept = made[f"{row.name}.weight"].reshape(-1, 4).count_nonzero(dim=1)
        assert int(kept.max()) <= 2 and row.sparsity == 0.5
    assert [row.folds for row in report.permuted] == [True] * 6
    assert all(row.difference < 1e-5 for row in report.permuted)


def test_it_is_the_same_as_pruning_the_reordered_model(tmp_path: Path) -> None:
    """The stream reorders block by block what a copy on disk has reordered as a whole."""
    folder = save_random(tiny_config("llama", vocab_size=384), tmp_path / "random", shard="1GB")
    for file in Path("model").glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    prune("streamed", model="random", method="magnitude")
    made, _ = reordered(folder, "magnitude")
    save_file(original(folder) | made, folder / "model.safetensors", {"format": "pt"})
    prune("whole", model="random", method="magnitude", permute="off")
    one, other = (load_file(f"{name}/model.safetensors") for name in ("streamed", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_less_is_lost_of_what_enters_reordered_matrices() -> None:
    """The error of down projections, mean over the blocks."""
    errors = {
        how: sum(row.error for row in prune(how, permute=how).rows if "down_proj" in row.name)
        for how in ("auto", "off")
    }
    assert errors["auto"] < errors["off"]


def test_off_is_what_a_run_by_effort_fast_is() -> None:
    prune("one", permute="off")
    prune("two", permute=None, effort="fast")
    assert weights("one") == weights("two")
    assert "permute" not in Path("two/llmsparse_recipe.yaml").read_text()
    assert "permuted" not in json.loads(Path("two/llmsparse_report.json").read_text())
    prune("three", permute=None, effort="default", pattern="unstructured", sparsity=0.5)
    assert "permute" not in Path("three/llmsparse_recipe.yaml").read_text()


def test_left_open_it_is_on_where_blocks_are_matched_and_no_zeros_are_to_stay() -> None:
    matched = KEYS | {"match_steps": 2}
    prune("one", match_steps=2)
    llmsparse.prune(model="model", output="two", **matched)
    assert weights("one") == weights("two")
    assert "permute: auto" in Path("two/llmsparse_recipe.yaml").read_text()
    for output, keys in (("three", KEYS), ("four", matched | {"keep_zeros": True})):
        llmsparse.prune(model="model", output=output, **keys)
        assert "permute" not in Path(f"{output}/llmsparse_recipe.yaml").read_text()


class StopAt(Silent):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.left, self.seen = blocks, 0

    def block(self, name: str) -> None:
        self.seen += 1
        if self.seen > self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_interrupted_run_gives_the_same_bytes(blocks: int, steps: int) -> None:
    whole = prune("whole", match_steps=steps)
    with pytest.raises(KeyboardInterrupt):
        prune("killed", match_steps=steps, progress=StopAt(blocks))
    resumed = prune("killed", match_steps=steps, resume=True)
    assert weights("whole") == weights("killed")
    assert whole.permuted == resumed.permuted


def test_the_recipe_beside_the_result_repeats_it() -> None:
    prune("one")
    assert "permute: auto" in Path("one/llmsparse_recipe.yaml").read_text()
    assert main(["prune", "--recipe", "one/llmsparse_recipe.yaml", "-o", "two"]) == 0
    assert weights("one") == weights("two")


def test_the_report_and_the_summary_say_what_was_reordered() -> None:
    report = prune()
    rows = json.loads(Path("out/llmsparse_report.json").read_text())["permuted"]
    assert [row["name"].partition("layers.")[2] for row in rows][:2] == ["0.self_attn.o_proj", "0.mlp.down_proj"]
    assert all(row["after"] >= row["before"] > 0.5 for row in rows)
    assert "inputs of 6 of 6 matrices; the pattern keeps " in dict(report.findings())["permuted"]


def test_the_plan_says_which_matrices_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["model", "-o", "out", "--pattern", "2:4", "--calibration", "notes.txt", "--seq-len", "32"]
    assert main(["plan", *flags, "--permute", "auto"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "inputs of 6 matrices, model.layers.0.self_attn.o_proj first, where that folds" in printed
    assert main(["prune", *flags, "--permute", "auto", "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["permute"]) == 6


def test_packed_folders_are_of_the_reordered_weights() -> None:
    prune("dense")
    prune("packed", format="packed")
    llmsparse.unpack("packed", "unpacked")
    one, other = (load_file(f"{name}/model.safetensors") for name in ("dense", "unpacked"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_zeros_that_are_kept_move_along() -> None:
    prune("sparse", permute="off", pattern="4:8", method="magnitude")
    report = prune("again", model="sparse", keep_zeros=True)
    made = load_file("again/model.safetensors")
    assert all(int(made[f"{row.name}.weight"].reshape(-1, 4).count_nonzero(dim=1).max()) <= 2 for row in report.rows)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pattern": "unstructured", "sparsity": 0.5}, "model.layers.0.self_attn.q_proj gets no pattern N:M"),
        (
            {"only": "*q_proj"},
            "what enters model.layers.0.self_attn.q_proj is not computed by a matrix of the same module",
        ),
    ],
)
def test_nothing_that_could_fold_is_refused_in_a_line(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(LlmsparseError, match="permute auto: nothing folds") as caught:
        prune(**keys)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("out.partial").exists()


def test_a_model_in_which_nothing_folds_is_refused_before_a_file_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_random(tiny_config("mamba", vocab_size=384), tmp_path / "mamba")
    for file in Path("model").glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    flags = [
        "mamba",
        "-o",
        "out",
        "--pattern",
        "2:4",
        "--calibration",
        "notes.txt",
        "--seq-len",
        "32",
        "--permute",
        "auto",
    ]
    assert main(["prune", *flags, "--match-steps", "0"]) == 2
    error = capsys.readouterr().err
    assert "nothing folds: what enters backbone.layers.0.mixer.out_proj" in error
    assert not Path("out").exists() and not Path("out.partial/model.safetensors").exists()
    report = prune("open", model="mamba", permute=None)  # by default it is no error
    assert not report.permuted and "permute" not in Path("open/llmsparse_recipe.yaml").read_text()


def test_what_does_not_fold_in_a_model_that_folds_elsewhere_is_named(tmp_path: Path) -> None:
    folder = save_random(tiny_config("qwen3_next", vocab_size=384), tmp_path / "next")
    for file in Path("model").glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    report = prune(model="next")
    assert any("model.layers.0.linear_attn.out_proj first, keep their order" in line for line in report.warnings)
