"""Effort: what each stands for, what the plan says of it, and that a user's own keys win."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import RecipeError
from llmsparse.pruners import ALPS, Swaps, Wanda
from llmsparse.pruning import duration
from llmsparse.pruning.effort import EFFORTS
from llmsparse.pruning.plan import PrunePlan
from llmsparse.pruning.recipe import PruneRecipe

SMALL: dict[str, Any] = {"calibration": "notes.txt", "calibration_samples": 4, "seq_len": 32, "device": "cpu"}


@pytest.fixture
def plan(
    tiny_llama: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    tiny_llama(tmp_path / "model")
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return lambda **keys: llmsparse.plan("model", **({"sparsity": 0.7} | SMALL | keys))


def settings(plan: PrunePlan) -> tuple[int, bool, str]:
    return plan.match_steps, plan.fading, type(plan.allocation).__name__.lower()


def test_what_each_effort_stands_for_where_matching_is_affordable(plan: Callable[..., Any]) -> None:
    assert settings(plan()) == settings(plan(effort="default")) == (200, True, "uniform")
    assert settings(plan(effort="fast")) == (0, False, "uniform")
    assert settings(plan(effort="best")) == (600, True, "uniform")


def test_where_it_is_not_zeros_are_shared_out_beyond_55_percent(
    plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "FLOPS_PER_THREAD", 1.0)
    assert settings(plan()) == settings(plan(effort="best")) == (0, False, "owl")
    assert settings(plan(sparsity=0.55)) == settings(plan(sparsity=None, pattern="2:4")) == (0, False, "uniform")
    with pytest.raises(RecipeError, match="nothing can fade; give --match-steps 200"):
        plan(refine="fading")


def test_keys_that_the_user_set_win(plan: Callable[..., Any]) -> None:
    assert settings(plan(match_steps=0)) == (0, False, "uniform"), "the method alone, as asked"
    assert settings(plan(effort="fast", match_steps=5)) == (5, False, "uniform")
    assert settings(plan(effort="best", match_steps=5, allocation="dlp")) == (5, True, "dlp")
    assert settings(plan(refine="none")) == (200, False, "uniform")
    assert settings(plan(effort="fast", match_steps=5, refine="fading")) == (5, True, "uniform")


def test_swaps_follow_every_method_and_the_written_recipe_gives_them_once(plan: Callable[..., Any]) -> None:
    made = plan(refine="swaps", method="wanda", match_steps=3, rules=[{"match": "*down_proj", "method": "alps"}])
    assert settings(made) == (3, False, "uniform") and made.to_json()["refine"] == "swaps"
    pruners = {choice.weight.name: choice.pruner for members in made.choices.values() for choice in members}
    assert all(isinstance(pruner, Swaps) for pruner in pruners.values())
    assert isinstance(pruners["model.layers.0.mlp.down_proj"].initial, ALPS)
    again = PruneRecipe(**made.resolved.resolved())
    assert again.refine == "swaps" and again.pruner == made.recipe.pruner == Swaps(Wanda())


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_weights_do_not_fade_by_a_text_that_their_method_does_not_look_at(
    method: str, plan: Callable[..., Any]
) -> None:
    assert not plan(method=method).fading and plan(method=method, refine="fading").fading


def test_the_plan_says_what_each_takes_and_the_written_recipe_what_was_decided(plan: Callable[..., Any]) -> None:
    made = plan()
    seconds = made.to_json()["seconds"]
    assert list(seconds) == list(EFFORTS) and 0 < seconds["fast"] < seconds["default"] < seconds["best"]
    assert made.rows(made.to_json())["takes"].startswith("about ")
    again = made.resolved.resolved()
    decided = {"effort": "default", "match_steps": 200, "refine": "fading"}
    assert again | decided == again and again["allocation"]["name"] == "uniform"


def test_several_processes_share_the_time_but_for_what_the_last_one_has_left(plan: Callable[..., Any]) -> None:
    made = replace(plan(method="sparsegpt", match_steps=8, calibration_samples=16, batch_size=2), threads=1)
    one, two, three, eight, many = (
        made.of_processes(size).to_json()["seconds"]["default"] for size in (1, 2, 3, 8, 64)
    )
    assert one == made.to_json()["seconds"]["default"]
    assert one / 2 <= two < 0.6 * one and one / 3 < three < two, "three of eight leaves are more than a third"
    assert three > eight >= many, "leaves and inputs run out"
    assert made.of_processes(64).match_steps == made.match_steps


def test_processes_on_one_machine_share_its_threads(plan: Callable[..., Any]) -> None:
    made = replace(plan(method="wanda", match_steps=0, calibration_samples=16, batch_size=2), threads=4)
    seconds = {size: made.of_processes(size).to_json()["seconds"]["default"] for size in (1, 2, 4, 8)}
    assert seconds[2] == pytest.approx(seconds[1]) and seconds[4] == pytest.approx(seconds[1]), (
        "half the work, half the threads"
    )
    assert seconds[8] < seconds[4], "one thread each at least"


def test_a_run_whose_methods_look_at_no_text_fades_all_the_same(plan: Callable[..., Any], tmp_path: Path) -> None:
    report = llmsparse.prune(
        "model", output="out", method="magnitude", sparsity=0.6, match_steps=12, refine="fading", **SMALL
    )
    assert report.sparsity == pytest.approx(0.6, abs=1e-3) and any(block.match["improved"] for block in report.blocks)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--effort", "bests"], "wanted fast, default or best"),
        (["--refine", "swap"], "wanted auto, none, swaps or fading"),
        (["--refine", "fading", "--match-steps", "0"], "weights fade while blocks are matched"),
    ],
)
def test_what_cannot_be_is_one_line(
    flags: list[str], said: str, plan: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "model", "--sparsity", "0.5", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
    assert not Path("model-sparsegpt-50").exists()


def test_looking_for_an_allocation_takes_the_time_of_the_tokens_that_are_looked_at(
    plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def extra(tokens: int) -> float:
        monkeypatch.setattr(duration, "LOOKED_TOKENS", tokens)
        owl, uniform = (duration.seconds_of(plan(match_steps=0, allocation=name)) for name in ("owl", "uniform"))
        return owl - uniform

    assert extra(64) == pytest.approx(extra(128) / 2) and extra(64) > 0, "of the 128 that there are"
    assert extra(1000) == pytest.approx(extra(128))
