"""`prune --format packed`: the dense result of the same run, packed, and with the same rules for resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sparse import assert_same_tensors

import llmsparse
from llmsparse.cli.app import main
from llmsparse.packing.folder import RECORD, PackedCheckpoint

SMALL: dict[str, Any] = {
    "method": "wanda",
    "calibration": "builtin",
    "calibration_samples": 4,
    "seq_len": 32,
    "match_steps": 0,
    "device": "cpu",
}
FLAGS = [f"{key}={value}" for key, value in SMALL.items()]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("prune-packed") / "tiny", hidden=64, ffn=96))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    report = json.loads(found.pop("llmsparse_report.json"))
    del report["timings"]
    return found | {"report": json.dumps(report).encode()}


def test_the_result_is_the_dense_one_packed(model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", model, "--sparsity", "0.7", "--format", "packed", *FLAGS, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["output"], len(told["packing"]["weights"])) == ("tiny-wanda-70-packed", 14)
    assert [path.name for path in here.iterdir()] == ["tiny-wanda-70-packed"]
    PackedCheckpoint(here / told["output"]).verify()
    llmsparse.prune(model=model, output="dense", sparsity=0.7, **SMALL)
    llmsparse.unpack(told["output"], "unpacked")
    assert_same_tensors(here / "dense", here / "unpacked")
    for name in ("config.json", "README.md", "tokenizer.json"):
        assert (here / "dense" / name).read_bytes() == (here / "unpacked" / name).read_bytes()
    assert "format: packed" in (here / told["output"] / "llmsparse_recipe.yaml").read_text()
    assert "ratio" in (here / told["output"] / "README.md").read_text()


@pytest.mark.parametrize(
    "step", ["llmsparse.pruning.packed.select_packable", "llmsparse.packing.pack.Selection._write_side_files"]
)
def test_a_run_that_stops_while_packing_resumes_to_the_same_bytes(
    step: str, model: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", model, "--pattern", "2:4", "--format", "packed", "-o", "out", *FLAGS]

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(step, interrupt)
        assert main(command) == 130
    assert "--resume" in capsys.readouterr().err and not Path("out").exists()
    assert main(["prune", model, "--pattern", "2:4", "-o", "out", *FLAGS, "--resume"]) == 2
    assert "recipe" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    resumed = files(here / "out")
    assert [path.name for path in here.iterdir()] == ["out"]
    assert main([*command, "--overwrite"]) == 0
    assert files(here / "out") == resumed and RECORD in resumed


def test_a_new_run_does_not_trust_what_an_unfinished_one_left(
    model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("llmsparse.pruning.packed.select_packable", interrupt)
        assert main(["prune", model, "--sparsity", "0.6", "--format", "packed", "-o", "out", *FLAGS]) == 130
    shards = [*FLAGS, "max_shard_size=20KB", "--overwrite"]
    assert main(["prune", model, "--sparsity", "0.7", "--format", "packed", "-o", "out", *shards]) == 0
    assert llmsparse.inspect("out", verify=True).packed[0].sparsity == pytest.approx(0.7, abs=0.02)


def test_the_plan_names_the_format_and_its_size(model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = llmsparse.plan(model=model, sparsity=0.7, format="packed", **SMALL)
    assert planned.to_json()["format"] == "packed"
    assert planned.to_json()["bytes_to_write"] < planned.to_json()["bytes_to_read"]
    result = llmsparse.prune(model=model, sparsity=0.7, format="packed", output="out", **SMALL)
    assert result.packing is not None
    assert planned.packed_bytes == pytest.approx(result.packing.bytes, rel=0.01)
    assert main(["prune", model, "--sparsity", "0.7", "--format", "packed", "--dry-run", *FLAGS]) == 0
    assert "packed; the dense checkpoint stands beside it until the run is done" in capsys.readouterr().out


def test_a_sparsity_that_packing_gains_nothing_by_is_refused_before_the_run(
    model: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", model, "--sparsity", "0.02", "--format", "packed", *FLAGS]) == 2
    error = capsys.readouterr().err
    assert "--format packed: at this sparsity no weight would become smaller" in error and error.count("\n") == 1
    assert main(["prune", model, "--sparsity", "0.5", "--format", "zip", *FLAGS]) == 2
    assert "got 'zip', wanted dense or packed" in capsys.readouterr().err
    assert not list(here.iterdir())


@pytest.mark.parametrize(("values", "near"), [("int8", 0.01), ("int4", 0.2)])
def test_values_may_be_stored_in_few_bits(values: str, near: float, model: str, here: Path) -> None:
    keys: dict[str, Any] = {"model": model, "sparsity": 0.7, **SMALL}
    planned = llmsparse.plan(format="packed", values=values, **keys)
    report = llmsparse.prune(format="packed", values=values, **keys)
    assert report.packing is not None and report.output == f"tiny-wanda-70-packed-{values}"
    assert planned.packed_bytes == pytest.approx(report.packing.bytes, rel=0.02)
    PackedCheckpoint(here / report.output).verify()
    llmsparse.prune(output="dense", **keys)
    llmsparse.unpack(report.output, "unpacked")
    before, after = (load_file(here / folder / "model.safetensors") for folder in ("dense", "unpacked"))
    for row in report.rows:
        one, other = before[f"{row.name}.weight"].float(), after[f"{row.name}.weight"].float()
        assert not other[one == 0].any() and torch.dist(one, other) < near * one.norm()
    assert all(
        torch.equal(before[name], after[name])
        for name in before
        if name.endswith(("norm.weight", "embed_tokens.weight"))
    )


def test_values_that_cannot_be(model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, wanted in (
        (["--values", "int8"], "give --format packed, too"),
        (["--values", "bf16", "--format", "packed"], "is stored in float32; leave --values out"),
        (["--values", "int3", "--format", "packed"], "got 'int3', wanted bf16, int8 or int4"),
    ):
        assert main(["prune", model, "--sparsity", "0.7", *arguments, *FLAGS]) == 2
        error = capsys.readouterr().err
        assert wanted in error and error.count("\n") == 1, error
    assert not list(here.iterdir())
