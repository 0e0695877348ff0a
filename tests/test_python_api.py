"""Calls from Python: what is accepted as a model, and mistakes in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmsparse
from llmsparse.errors import RecipeError
from llmsparse.factorization.recipe import FactorizeRecipe
from llmsparse.models.likelihood import perplexity_of
from llmsparse.pruning.recipe import PruneRecipe

SMALL: dict[str, Any] = {"calibration": "builtin", "calibration_samples": 4, "seq_len": 32, "device": "cpu"}
VERBS = [
    (llmsparse.prune, PruneRecipe(model="m", sparsity=0.5)),
    (llmsparse.plan, PruneRecipe(model="m", sparsity=0.5)),
    (llmsparse.factorize, FactorizeRecipe(model="m")),
]


@pytest.mark.parametrize(("verb", "recipe"), VERBS)
def test_a_recipe_and_keys_beside_it_are_refused(verb: Callable[..., Any], recipe: Any) -> None:
    with pytest.raises(RecipeError, match="and seed beside it"):
        verb(recipe, seed=3)
    with pytest.raises(RecipeError, match="two models"):
        verb("m", model="n")
    with pytest.raises(RecipeError, match="got int first"):
        verb(3)


def test_a_model_is_a_name_or_a_path(tiny_llama: Callable[..., Path], tmp_path: Path, text: str) -> None:
    model = tiny_llama(tmp_path / "model", layers=1)
    notes = tmp_path / "notes.txt"
    notes.write_text(text[:20_000])
    report = llmsparse.prune(model=model, output=tmp_path / "out", sparsity=0.5, match_steps=0, **SMALL)
    assert report.output == str(tmp_path / "out")
    assert llmsparse.plan(model, sparsity=0.5, **SMALL).choices
    assert llmsparse.plan(str(model), sparsity=0.5, **{**SMALL, "calibration": notes}).choices
    few = {"experts": 4, "shared": 1, "active": 1, "router_steps": 5}
    assert llmsparse.factorize(model, output=tmp_path / "moe", **few, **SMALL).blocks
    assert llmsparse.perplexity(tmp_path / "out", notes, seq_len=32, windows=2).tokens == 62


@pytest.mark.parametrize("wrong", [{"seq_len": 1}, {"seq_len": 0}, {"batch_size": -1}, {"windows": 0}], ids=str)
def test_a_number_that_cannot_be_is_one_line(wrong: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))}: got .*, wanted at least"):
        llmsparse.perplexity("builtin", "builtin", **wrong)  # type: ignore[arg-type]


def test_a_perplexity_beyond_any_float_is_cut_off_and_nan_is_not_hidden() -> None:
    assert perplexity_of(2.0, 2) == math.e
    assert perplexity_of(1e6, 2) == perplexity_of(math.inf, 2) == math.exp(700)
    assert math.isnan(perplexity_of(math.nan, 2))
