"""Globs over on-disk names."""

from __future__ import annotations

import pytest

from llmsparse.errors import RecipeError
from llmsparse.models.streamed import Weight
from llmsparse.pruning.selection import matching_weights


def weight(name: str, prunable: bool = True) -> Weight:
    return Weight(
        name, name + ".weight", None, (8, 8), False, (name, None), "linear" if prunable else "router", prunable
    )


WEIGHTS = [
    weight("b.0.q_proj"),
    weight("b.0.up_proj"),
    weight("b.0.gate", False),
    weight("b.1.q_proj"),
    weight("lm_head", False),
]


def names(**globs: list[str]) -> list[str]:
    return [chosen.name for chosen in matching_weights(WEIGHTS, **globs)]


def test_by_default_what_the_model_calls_prunable_is_chosen() -> None:
    assert names() == ["b.0.q_proj", "b.0.up_proj", "b.1.q_proj"]


def test_only_restricts_include_adds_exclude_removes() -> None:
    assert names(only=["*.q_proj"]) == ["b.0.q_proj", "b.1.q_proj"]
    assert names(include=["lm_head"]) == ["b.0.q_proj", "b.0.up_proj", "b.1.q_proj", "lm_head"]
    assert names(only=["*.q_proj"], include=["lm_head"], exclude=["b.1.*"]) == ["b.0.q_proj", "lm_head"]


@pytest.mark.parametrize("option", ["only", "include", "exclude"])
def test_a_glob_that_matches_nothing_is_an_error_with_a_hint(option: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"--{option} 'b.0.q_prj' matches none of 5 weights; did you mean 'b.0.q_proj'"
    ):
        names(**{option: ["b.0.q_prj"]})


def test_a_tied_head_is_called_by_its_name() -> None:
    with pytest.raises(RecipeError, match=r"--include 'lm_h.*': lm_head is tied to the input embedding"):
        matching_weights(WEIGHTS[:-1], include=["lm_h*"], tied="lm_head")


def test_a_selection_that_leaves_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="nothing is left"):
        names(exclude=["*"])
