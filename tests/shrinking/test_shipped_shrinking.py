"""The shipped recipes of smaller models run, and say what for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmsparse.cli.app import main
from llmsparse.cli.recipes import purpose
from llmsparse.runs import recipe_file
from llmsparse.shrinking.recipe import ShrinkRecipe


@pytest.mark.parametrize(
    ("name", "folder", "field", "before", "after"),
    [
        ("depth-75", "model-blocks-75", "num_hidden_layers", 4, 3),
        ("ffn-75", "model-ffn-75", "intermediate_size", 64, 48),
    ],
)
def test_recipe_runs(
    name: str, folder: str, field: str, before: int, after: int, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    assert len(purpose(recipe_file.shipped("shrink")[name])) > 40
    model = tiny_llama(tmp_path / "model", layers=4)
    assert ShrinkRecipe.load(name, {"model": str(model)}).output_folder.name == folder
    small = ["calibration=builtin", "calibration_samples=8", "seq_len=32", "device=cpu"]
    assert main(["shrink", str(model), "--recipe", name, "-o", str(tmp_path / "out"), *small]) == 0
    configs = [json.loads((one / "config.json").read_text()) for one in (model, tmp_path / "out")]
    assert [config[field] for config in configs] == [before, after]
