from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmsparse.cli.recipes import purpose
from llmsparse.pruning.pipeline import prune
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.runs import recipe_file
from llmsparse.sparsity.patterns import NofM

NAMES = list(recipe_file.shipped())


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("recipes") / "model", layers=1)


def test_the_promised_recipes_are_shipped() -> None:
    assert {"wanda-50", "sparsegpt-50", "sparsegpt-2of4", "dsnot-70", "magnitude-50", "alps-70"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_valid_and_says_what_for(name: str) -> None:
    recipe = PruneRecipe.load(name, {"model": "org/name"})
    assert name.startswith(recipe.method_name)
    assert recipe.output_folder.name == f"name-{name}"
    assert len(purpose(recipe_file.shipped()[name])) > 40


@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs(name: str, model: Path, tmp_path: Path) -> None:
    small = {"calibration": "builtin", "calibration_samples": 4, "seq_len": 32, "device": "cpu"}
    recipe = PruneRecipe.load(name, {"model": str(model), "output": str(tmp_path / "out"), **small}, ["match_steps=0"])
    report = prune(recipe)
    pattern = recipe.pattern_for("any")
    assert report.sparsity == pytest.approx(pattern.sparsity, abs=0.02)
    assert {row.pattern for row in report.rows} == {"2:4" if isinstance(pattern, NofM) else "unstructured"}
    assert (tmp_path / "out" / "llmsparse_recipe.yaml").is_file()
