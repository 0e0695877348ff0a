"""Last projections of experts: found where they were planted, in numpy's own equations, left alone where it does not help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmsparse.models.streamed import Activations, Block, StreamedModel
from llmsparse.scoring.mixture import Call, Mixture, find_mixture, intercepted
from llmsparse.shrinking.expert_refit import called, hidden_units, last_projections, one_in, refit_experts
from tests.architectures import save_random, stream, tiny_config, windows

ARCHITECTURES = ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "llama4_text", "deepseek_v3"]


def opened(name: str, folder: Path, batches: int = 16) -> tuple[StreamedModel, Block, Mixture, Activations]:
    """A model, its first block that has experts, these, and what enters the block."""
    model = stream(save_random(tiny_config(name), folder))
    acts = model.embed(windows(*[(2, 16)] * batches))
    index = next(index for index in range(len(model.block_names)) if find_mixture(model, index) is not None)
    for before in range(index):
        acts = model.block(before).run(acts)
    mixture = find_mixture(model, index)
    assert mixture is not None
    return model, model.block(index), mixture, acts


def outputs(block: Block, mixture: Mixture, acts: Activations) -> dict[int, Tensor]:
    """What the experts give together, batch by batch."""
    found: list[Tensor] = []

    def keep(call: Call) -> Tensor:
        seen = call.observe()
        found.append(seen.output)
        return seen.returned

    with torch.no_grad(), intercepted(block, mixture, keep):
        for batch in range(len(acts.hidden)):
            block.call(acts, batch)
    return dict(enumerate(found))


def spoil(block: Block, mixture: Mixture) -> None:
    """Other last projections than the block had."""
    for number, weight in enumerate(last_projections(block, mixture)):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        view = block.view(weight)
        block.store(weight, view + noise * view.std())
    block.reload()


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_projections_that_were_lost_are_found_again(name: str, tmp_path: Path) -> None:
    _, block, mixture, acts = opened(name, tmp_path)
    targets = outputs(block, mixture, acts)
    spoil(block, mixture)
    said = refit_experts(block, acts, mixture, dict(targets))
    assert said["kept"] and said["error_after"] < 0.25 * said["error_before"]
    given = outputs(block, mixture, acts)
    missed = [
        ((one - target).square().sum() / target.square().sum()).item()
        for one, target in zip(given.values(), targets.values(), strict=True)
    ]
    assert sum(missed) / len(missed) < 0.4 * said["error_before"]  # the module has them, biases and all
    assert np.mean(missed[::8]) == pytest.approx(said["error_after"], rel=0.05)


@torch.no_grad()
def test_an_expert_takes_what_the_others_leave(tmp_path: Path) -> None:
    """One sweep of block coordinate descent, in numpy: argmin ‖y − W̃h‖² + λ‖W̃ − W‖², λ of those tried that judges best."""
    _, block, mixture, acts = opened("qwen3_moe", tmp_path)
    targets = outputs(block, mixture, acts)
    spoil(block, mixture)
    gates: list[np.ndarray] = []
    hidden: list[np.ndarray] = []
    mlp, entering = block.module.get_submodule("mlp"), list[Tensor]()
    hook = mlp.register_forward_pre_hook(lambda module, args: entering.append(args[0].reshape(-1, args[0].shape[-1])))
    for batch in range(len(acts.hidden)):
        block.call(acts, batch)
    hook.remove()
    gate_up = mlp.get_parameter("experts.gate_up_proj")
    for x in entering:
        p = torch.softmax(x @ mlp.get_parameter("gate.weight").T, -1)
        values, index = p.topk(2)
        if block.module.get_submodule("mlp.gate").norm_topk_prob:
            values = values / values.sum(-1, keepdim=True)
        gates.append(torch.zeros_like(p).scatter(1, index, values).double().numpy())  # (tokens, experts)
        gate, up = torch.einsum("eoi,ti->eto", gate_up, x).chunk(2, -1)
        hidden.append((torch.nn.functional.silu(gate) * up).double().numpy())  # (experts, tokens, inner)
    weights = [block.view(weight).double().numpy().copy() for weight in last_projections(block, mixture)]
    left = [
        target.double().numpy() - sum(g[:, [e]] * h[e] @ weights[e].T for e in range(4))
        for target, g, h in zip(targets.values(), gates, hidden, strict=True)
    ]
    for expert in range(4):
        units = [g[:, [expert]] * h[expert] for g, h in zip(gates, hidden, strict=True)]
        wanted = [r + h @ weights[expert].T for r, h in zip(left, units, strict=True)]
        fitted = [batch for batch in range(16) if batch % 8]
        gram = sum(units[batch].T @ units[batch] for batch in fitted)
        along = sum(units[batch].T @ wanted[batch] for batch in fitted)
        best, least = weights[expert], np.inf
        for damp in (0, 0.001, 0.01, 0.1, 1.0):
            pull = damp * np.diag(gram).mean()
            tried = (
                np.linalg.solve(gram + pull * np.eye(len(gram)), along + pull * weights[expert].T).T if damp else best
            )
            error = sum(np.square(wanted[batch] - units[batch] @ tried.T).sum() for batch in (0, 8))
            if error < least:
                best, least = tried, error
        left = [r - h @ (best - weights[expert]).T for r, h in zip(left, units, strict=True)]
        weights[expert] = best
    assert refit_experts(block, acts, mixture, targets)["kept"]
    for weight, expected in zip(last_projections(block, mixture), weights, strict=True):
        np.testing.assert_allclose(block.view(weight).numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_what_enters_the_last_projection_gives_what_the_expert_gives(name: str, tmp_path: Path) -> None:
    _, block, mixture, acts = opened(name, tmp_path, batches=2)
    call = Call.joined([called(block, acts, mixture, batch) for batch in range(2)])
    biased = "down_proj_bias" in " ".join(block.stored)
    for weight in last_projections(block, mixture):
        expert = weight.slot[1] or 0
        tokens, h = hidden_units(block, weight, call)
        alone, gates = call.sent(expert)
        assert tokens.equal(alone) and tokens.max() >= 32  # of both batches
        if not biased:
            torch.testing.assert_close(
                h @ block.view(weight).T, gates[:, None] * call.run(expert, tokens), atol=1e-5, rtol=1e-4
            )


@torch.no_grad()
def test_nothing_is_fitted_where_nothing_was_lost(tmp_path: Path) -> None:
    _, block, mixture, acts = opened("qwen3_moe", tmp_path)
    before = {key: tensor.clone() for key, tensor in block.stored.items()}
    said = refit_experts(block, acts, mixture, outputs(block, mixture, acts))
    assert not said["kept"] and said["error_before"] < 1e-6
    assert all(torch.equal(before[key], block.stored[key]) for key in before)


@torch.no_grad()
def test_a_fit_that_does_not_hold_on_other_tokens_is_not_kept(tmp_path: Path) -> None:
    _, block, mixture, acts = opened("qwen3_moe", tmp_path)
    before = {key: tensor.clone() for key, tensor in block.stored.items()}
    targets = outputs(block, mixture, acts)
    targets = {batch: -target if batch % 8 else 1.001 * target for batch, target in targets.items()}  # 0 and 8 judge
    assert not refit_experts(block, acts, mixture, targets)["kept"]
    assert all(torch.equal(before[key], block.stored[key]) for key in before)


@torch.no_grad()
def test_a_sparse_expert_keeps_its_zeros(tmp_path: Path) -> None:
    _, block, mixture, acts = opened("qwen3_moe", tmp_path)
    targets = outputs(block, mixture, acts)
    spoil(block, mixture)
    sparse = last_projections(block, mixture)[1]
    block.store(sparse, block.view(sparse) * (torch.rand(sparse.shape) < 0.5))
    block.reload()
    before = block.view(sparse).clone()
    said = refit_experts(block, acts, mixture, targets)
    assert said["kept"] and said["experts"] == [0, 2, 3]
    assert torch.equal(block.view(sparse), before)


@torch.no_grad()
def test_one_batch_is_too_little_to_judge_by(tmp_path: Path) -> None:
    _, block, mixture, acts = opened("qwen3_moe", tmp_path, batches=1)
    said = refit_experts(block, acts, mixture, outputs(block, mixture, acts))
    assert said == {"kept": False, "why": "one batch of calibration: none to judge by"}


def test_one_batch_in_some_is_fitted_on_where_there_are_32_tokens_for_every_input_of_every_expert() -> None:
    enough = 32 * 1024 * 32 // 8  # tokens, of which an expert is sent a quarter
    assert one_in(4 * enough, inner=1024, kept=32, active=8) == 4
    assert one_in(enough, inner=1024, kept=32, active=8) == one_in(enough // 2, inner=1024, kept=32, active=8) == 1
    assert one_in(2**16, inner=8, kept=4, active=2) == 2  # 32768 always


@torch.no_grad()
def refits(block: Block, acts: Activations, mixture: Mixture) -> Callable[[range], dict[str, Any]]:
    """Spoils the experts; what is returned refits them on numbered batches, each time from there."""
    targets = outputs(block, mixture, acts)
    spoil(block, mixture)
    before = {key: tensor.clone() for key, tensor in block.stored.items()}

    def refitted(batches: range) -> dict[str, Any]:
        block.stored.update({key: tensor.clone() for key, tensor in before.items()})
        block.reload()
        return refit_experts(block, acts, mixture, {batch: targets[batch] for batch in batches})

    return refitted


@torch.no_grad()
def test_all_tokens_that_may_judge_do_whatever_leaf_they_lie_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, block, mixture, acts = opened("qwen3_moe", tmp_path, batches=8)  # the first one judges
    refitted = refits(block, acts, mixture)
    every = refitted(range(8))
    monkeypatch.setattr("llmsparse.shrinking.expert_refit.JUDGES", 32)
    assert refitted(range(8)) == every
    monkeypatch.setattr("llmsparse.shrinking.expert_refit.JUDGES", 4)
    assert refitted(range(8)) != every


@torch.no_grad()
def test_batches_that_are_not_numbered_are_not_fitted_on(tmp_path: Path) -> None:
    _, block, mixture, acts = opened("qwen3_moe", tmp_path)
    refitted = refits(block, acts, mixture)
    every, some = refitted(range(16)), refitted(range(0, 16, 2))
    assert some["kept"] and some["error_before"] != every["error_before"]  # 0 judges, not 0 and 8
    acts.hidden[1].fill_(torch.nan)
    assert refitted(range(0, 16, 2)) == some
