"""Factors on what experts give: found where they were planted, folded in where they belong, left alone where they do not help."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmsparse.models.streamed import Activations, Block, StreamedModel
from llmsparse.scoring.mixture import Call, Mixture, find_mixture, intercepted
from llmsparse.shrinking.expert_refit import Equations, fold, refit_experts
from tests.architectures import save_random, stream, tiny_config, windows


def opened(name: str, folder: Path, batches: int = 8) -> tuple[StreamedModel, Block, Mixture, Activations]:
    model = stream(save_random(tiny_config(name), folder))
    mixture = find_mixture(model, 0)
    assert mixture is not None
    acts = model.embed(windows(*[(2, 16)] * batches))
    return model, model.block(0), mixture, acts


def outputs(block: Block, mixture: Mixture, acts: Activations, factors: Tensor | None = None) -> list[Tensor]:
    """What the experts give together, batch by batch: each times its factor."""
    found: list[Tensor] = []

    def keep(call: Call) -> Tensor:
        seen = call.observe()
        weights = torch.ones(mixture.experts) if factors is None else factors
        there = call.index < mixture.experts
        scale = weights[call.index.where(there, 0)][..., None]
        found.append((call.parts(torch.arange(len(call.index))) * scale).sum(1))
        return seen.returned

    with torch.no_grad(), intercepted(block, mixture, keep):
        for batch in range(len(acts.hidden)):
            block.call(acts, batch)
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "gpt_oss", "llama4_text"])
def test_factors_that_were_planted_are_found_and_folded_in(name: str, tmp_path: Path) -> None:
    _, block, mixture, acts = opened(name, tmp_path)
    planted = torch.tensor([0.5, 2.0, 1.0, 1.5])
    targets = outputs(block, mixture, acts, planted)
    said = refit_experts(block, acts, mixture, targets)
    assert said["kept"] and said["error_after"] < 0.05 * said["error_before"]
    assert said["factors"] == pytest.approx(planted.tolist(), abs=0.15)
    for given, target in zip(outputs(block, mixture, acts), targets, strict=True):  # biases are folded in too
        assert ((given - target).square().sum() / target.square().sum()).item() < 0.05


def test_what_is_stored_is_the_module_again(tmp_path: Path) -> None:
    _, block, mixture, _ = opened("gpt_oss", tmp_path)
    before = {key: tensor.clone() for key, tensor in block.stored.items()}
    factors = torch.tensor([1.0, 2.0, 1.0, 0.5])
    fold(block, mixture, factors)
    changed = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], block.stored[key])}
    assert changed == {"down_proj", "down_proj_bias"}
    for key in before:
        if "down_proj" in key:
            assert torch.equal(block.stored[key], before[key] * factors.view(-1, *[1] * (before[key].dim() - 1)))
    assert block.module.get_parameter("mlp.experts.down_proj_bias").equal(
        next(tensor for key, tensor in block.stored.items() if key.endswith("down_proj_bias"))
    )


def test_nothing_is_fitted_where_nothing_was_lost(tmp_path: Path) -> None:
    _, block, mixture, acts = opened("qwen3_moe", tmp_path)
    before = {key: tensor.clone() for key, tensor in block.stored.items()}
    said = refit_experts(block, acts, mixture, outputs(block, mixture, acts))
    assert not said["kept"] and said["error_before"] < 1e-6
    assert all(torch.equal(before[key], block.stored[key]) for key in before)


def test_a_fit_that_does_not_hold_on_other_tokens_is_not_kept(tmp_path: Path) -> None:
    _, block, mixture, acts = opened("qwen3_moe", tmp_path)
    targets = outputs(block, mixture, acts)
    targets = [target if batch == 0 else 3 * target for batch, target in enumerate(targets)]  # batch 0 judges
    assert not refit_experts(block, acts, mixture, targets)["kept"]


def test_one_batch_is_too_little_to_judge_by(tmp_path: Path) -> None:
    _, block, mixture, acts = opened("qwen3_moe", tmp_path, batches=1)
    said = refit_experts(block, acts, mixture, outputs(block, mixture, acts, torch.full((4,), 2.0)))
    assert said == {"kept": False, "why": "one batch of calibration: none to judge by"}


def test_equations_are_numpys() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(50)])  # 5 stands for none
    parts, target = torch.randn(50, 3, 8, generator=generator), torch.randn(50, 8, generator=generator)
    equations = Equations.empty(5)
    for rows in torch.arange(50).split(20):
        equations.add(index[rows], parts[rows], target[rows])
    full = np.zeros((50, 6, 8))
    for token in range(50):
        for place in range(3):
            full[token, index[token, place]] = parts[token, place].numpy()
    full = full[:, :5]
    np.testing.assert_allclose(equations.products.numpy(), np.einsum("tid,tjd->ij", full, full), atol=1e-4)
    np.testing.assert_allclose(equations.targets.numpy(), np.einsum("tid,td->i", full, target.numpy()), atol=1e-4)
    factors = torch.tensor([0.5, 1.0, 2.0, -1.0, 0.0])
    left = target.numpy() - np.einsum("tid,i->td", full, factors.numpy())
    assert equations.error(factors) == pytest.approx((left**2).sum() / (target.numpy() ** 2).sum(), rel=1e-5)
