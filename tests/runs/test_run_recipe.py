"""What the recipes of every verb share: flags over files over defaults, errors that name the place, YAML that loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmsparse.errors import RecipeError
from llmsparse.factorization.recipe import FactorizeRecipe
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.runs.recipe import RunRecipe, from_arguments, refuse_both
from llmsparse.tuning.recipe import TuneRecipe

Kind = type[RunRecipe]
NEEDED: dict[Kind, dict[str, Any]] = {
    PruneRecipe: {"model": "m", "sparsity": 0.5},
    FactorizeRecipe: {"model": "m"},
    TuneRecipe: {"model": "m", "teacher": "t", "text": "builtin"},
}
every_kind = pytest.mark.parametrize("kind", NEEDED, ids=lambda kind: kind.__name__)


@every_kind
def test_what_is_dumped_loads_to_an_equal_recipe(kind: Kind, tmp_path: Path) -> None:
    recipe = kind(**NEEDED[kind], seed=7, max_shard_size="1GB")
    (tmp_path / "r.yaml").write_text(recipe.dump())

    assert kind.load(tmp_path / "r.yaml").resolved() == recipe.resolved()


@every_kind
def test_assignments_count_over_flags_over_the_file(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(kind(**NEEDED[kind], seed=1, seq_len=11, output="file").dump())

    recipe = kind.load(tmp_path / "r.yaml", {"seed": 2, "seq_len": 12, "output": None}, ["seed=3"])

    found = recipe.model_dump()
    assert (found["seed"], found["seq_len"], found["output"]) == (3, 12, "file")


@every_kind
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("sede", 1, "did you mean 'seed'?"),
        ("seed", True, "seed: got true, wanted a whole number"),
        ("seed", -1, "seed: "),
        ("seq_len", 1, "seq_len: "),
        ("device", "tpu", "device: got 'tpu', wanted auto, cpu, cuda or cuda:0"),
        ("max_shard_size", "5 apples", "max_shard_size: got '5 apples', wanted a positive number of bytes"),
        ("model", "", "model: got '', wanted a name or a path"),
        ("output", "", "output: got '', wanted a name or a path"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_key(kind: Kind, key: str, value: Any, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        kind(**{**NEEDED[kind], key: value})

    assert said in str(error.value) and "\n" not in str(error.value)


@every_kind
def test_a_wrong_value_in_a_file_is_told_with_its_line(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(kind(**NEEDED[kind]).dump() + "max_shard_size: 5GB\n")
    (tmp_path / "wrong.yaml").write_text("model: m\nmax_shard_size: huge\n")

    with pytest.raises(RecipeError, match=r"wrong\.yaml:2: max_shard_size: got 'huge'"):
        kind.load(tmp_path / "wrong.yaml", {key: value for key, value in NEEDED[kind].items() if key != "model"})
    with pytest.raises(RecipeError, match=r"r\.yaml:\d+: .*twice"):
        kind.load(tmp_path / "r.yaml")


@every_kind
def test_a_copy_with_other_values_is_checked_like_a_new_one(kind: Kind) -> None:
    recipe = kind(**NEEDED[kind])

    assert recipe.replace(seed=5).model_dump()["seed"] == 5
    with pytest.raises(RecipeError, match="seed"):
        recipe.replace(seed=-1)


@every_kind
def test_a_path_from_python_is_a_name(kind: Kind, tmp_path: Path) -> None:
    assert kind(**{**NEEDED[kind], "model": tmp_path}).model_dump()["model"] == str(tmp_path)


@every_kind
def test_a_call_takes_a_recipe_or_keys_but_not_both(kind: Kind) -> None:
    recipe = kind(**NEEDED[kind])

    assert from_arguments(kind, recipe, {}) is recipe
    assert from_arguments(kind, None, NEEDED[kind]) == recipe
    with pytest.raises(RecipeError, match=f"got a {kind.__name__} and seed beside it"):
        from_arguments(kind, recipe, {"seed": 1})
    with pytest.raises(RecipeError, match="got two models"):
        from_arguments(kind, "m", NEEDED[kind])


def test_a_run_either_goes_on_or_starts_anew() -> None:
    refuse_both(True, False)
    refuse_both(False, True)

    with pytest.raises(RecipeError, match="choose one"):
        refuse_both(True, True)
