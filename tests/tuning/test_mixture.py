"""A mixture seen through its parts is the one that transformers runs, in every container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, random_model, tiny_config
from safetensors.torch import save_file

import llmsparse
from llmsparse.factorization.router import top
from llmsparse.tuning.distillation import load_both
from llmsparse.tuning.plan import make_plan
from llmsparse.tuning.recipe import TuneRecipe

CASES: list[tuple[str, str, int, int, str]] = [  # source, container, shared, active, blocks kept dense
    ("llama", "glm4_moe", 1, 1, "0"),
    ("mistral", "mixtral", 0, 2, "none"),
    ("qwen2", "qwen2_moe", 1, 2, "1"),
    ("qwen3", "qwen3_moe", 0, 2, "0"),
]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = torch.randint(3, VOCABULARY, (40, 32), generator=torch.Generator().manual_seed(1))
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": ids}, file)
    return file


@pytest.mark.parametrize(("source", "container", "shared", "active", "kept"), CASES)
def test_its_parts_are_what_transformers_runs_and_it_can_be_tuned(
    source: str, container: str, shared: int, active: int, kept: str, tokens: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    random_model(tiny_config(source, num_hidden_layers=3, intermediate_size=64)).save_pretrained(tmp_path / "dense")
    llmsparse.factorize(
        model=str(tmp_path / "dense"), output=str(tmp_path / "moe"), experts=4, shared=shared, active=active,
        keep_dense=kept, container=container, router_steps=5, calibration=str(tokens), calibration_samples=16,
        device="cpu",
    )  # fmt: skip
    keys: dict[str, Any] = {"model": str(tmp_path / "moe"), "teacher": str(tmp_path / "dense"), "text": str(tokens)}
    recipe = TuneRecipe(**keys, output=str(tmp_path / "out"), steps=3, batch_size=8, device="cpu")
    plan = make_plan(recipe)
    assert plan.container.name == container
    distillation = load_both(plan)
    assert [mixture.name for mixture in distillation.mixtures] == [
        f"model.layers.{index}.mlp" for index in range(3) if str(index) not in kept
    ]
    x = torch.randn(50, 64 if source == "x" else plan.model.hidden_size)
    for mixture in distillation.mixtures:
        with torch.no_grad():
            expected = mixture.module(x[None])[0]
            logits, weights, chosen = mixture.gate(x)
            shares = torch.zeros(50, mixture.routed).scatter_(1, chosen, mixture.active * weights)
            got = mixture.shared_output(x) + (mixture.expert_outputs(x) * shares[..., None]).sum(1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixture.logits(x), logits)
        best = top(mixture.ranking(logits), mixture.active)
        assert torch.equal(best, torch.zeros_like(best).scatter_(1, chosen, True))
        mixture.sharpen(x)
        scores = mixture.scores(logits)
        assert 0.7 < (scores - scores.mean(1, keepdim=True)).square().mean().sqrt() < 1.5

    llmsparse.tune(recipe)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
