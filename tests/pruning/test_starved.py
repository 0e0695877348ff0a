"""Experts that saw a handful of tokens fall back, visibly; what saw enough does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import llmsparse
from llmsparse.calibration.inputs import Input
from llmsparse.errors import LlmsparseError
from llmsparse.models.streamed import Weight
from llmsparse.pruners import PRUNERS, DSnoT, Magnitude, Pruner, SparseGPT, Wanda
from llmsparse.pruning.selection import Choice
from llmsparse.pruning.starved import pruner_that_fits
from llmsparse.sparsity.patterns import Unstructured
from tests.architectures import random_model, tiny_config

WIDTH = 64


def fitting(pruner: Pruner, tokens: int, *, total: int = 10_000, expert: int | None = 3) -> tuple[Pruner, str | None]:
    kind = "linear" if expert is None else "expert"
    weight = Weight("b.0.up.3", "b.0.up", expert, (8, WIDTH), False, ("up", expert), kind, True)
    name = next(name for name, method in PRUNERS.items() if type(pruner) is method)
    choice = Choice(weight, pruner, name, Unstructured(0.5, "row"))
    return pruner_that_fits(choice, Input((weight.slot,), (weight,), tokens=tokens), total)


@pytest.mark.parametrize(
    ("pruner", "least"),
    [(Magnitude(), 0), (Wanda(), 32), (DSnoT(), 32), (SparseGPT(), 96), (DSnoT(initial=SparseGPT()), 96)],
)
def test_the_least_number_of_tokens_is_that_of_the_statistic_and_the_width(pruner: Pruner, least: int) -> None:
    assert fitting(pruner, least) == (pruner, None)
    if least:
        instead, note = fitting(pruner, least - 1)
        assert note is not None and f"{least - 1} calibration tokens reached it" in note
        assert note.endswith(f"wants {least}")
        assert instead == (Wanda() if least > 32 else Magnitude())


def test_below_the_least_of_wanda_magnitude_is_left() -> None:
    assert fitting(SparseGPT(), 31) == (
        Magnitude(),
        "magnitude: 31 calibration tokens reached it, sparsegpt wants 96",
    )
    assert fitting(Wanda(), 1)[1] == "magnitude: 1 calibration token reached it, wanda wants 32"
    assert fitting(Wanda(), 0)[1] == "magnitude: no calibration token reached it, wanda wants 32"


def test_a_weight_that_saw_all_of_a_short_text_is_pruned_as_asked() -> None:
    assert fitting(SparseGPT(), 8, total=8, expert=None) == (SparseGPT(), None)


def test_a_weight_that_is_no_expert_and_saw_nothing_is_an_error() -> None:
    with pytest.raises(LlmsparseError, match=r"no calibration token reached b\.0\.up\.3; leave it out with --exclude"):
        fitting(Wanda(), 0, expert=None)


def test_a_run_says_what_fell_back_and_its_report_is_strict_json(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", num_experts=48, num_experts_per_tok=1, num_hidden_layers=1)
    random_model(config).save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(3, 97, (24, 16), generator=generator)}, tmp_path / "ids.safetensors")
    report = llmsparse.prune(
        model=str(tmp_path / "model"),
        output=str(tmp_path / "out"),
        method="sparsegpt",
        sparsity=0.5,
        match_steps=0,
        calibration=str(tmp_path / "ids.safetensors"),
        calibration_samples=16,
    )
    experts = [row for row in report.rows if ".experts." in row.name]
    assert {row.tokens == 0 for row in experts} == {True, False}
    for row in experts:
        width, notes = row.shape[1], row.notes
        fell = notes.get("fallback", "sparsegpt").partition(":")[0]
        enough = row.tokens >= max(32, round(1.5 * width))
        assert fell == ("sparsegpt" if enough else "wanda" if row.tokens >= 32 else "magnitude"), row
        assert (row.error is None) == (row.tokens == 0)
        assert row.sparsity == 0.5
    assert any("weights of experts saw too few calibration tokens" in warning for warning in report.warnings)

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    text = (tmp_path / "out" / "llmsparse_report.json").read_text()
    written = json.loads(text, parse_constant=refuse)
    assert any(row["error"] is None for row in written["weights"])
