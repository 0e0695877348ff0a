"""The block before a gap takes over what a linear map of its last matrix's input can say of the blocks that went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmsparse.calibration.least_squares import HELD_BACK
from llmsparse.shrinking.folding import adds_up, fold, last_matrix
from tests.architectures import random_model, stream, tiny_config
from tests.shrinking.small_models import load, logits, random_folder, saved, shrink


@torch.no_grad()
def test_the_last_matrix_becomes_the_closed_form(tmp_path: Path) -> None:
    model: Any = random_model(tiny_config("llama", num_hidden_layers=3))
    folder = saved(model, tmp_path)
    ids = load_file(folder / "windows.safetensors")["input_ids"]
    streamed = stream(folder / "model")
    acts = streamed.embed(list(ids.split(4)))
    made = streamed.block(0)
    down = made.view(next(weight for weight in made.weights if weight.name.endswith("down_proj"))).clone()

    def beyond(outputs: list[Tensor]) -> list[Tensor]:
        later = type(acts)(list(outputs), acts.calls)
        block = streamed.block(1)
        block.run(later, into=later)
        return later.hidden

    folded = fold(made, acts, beyond, 32)
    assert folded is not None and folded.projection.endswith("layers.0.mlp.down_proj")

    entering: list[Tensor] = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: entering.append(args[0].flatten(0, 1))
    )
    states = model.model(ids, output_hidden_states=True).hidden_states
    h = entering[0].numpy().astype(float)
    more = (states[2] - states[1]).flatten(0, 1).numpy().astype(float)
    w, judge = down.numpy().astype(float), np.arange(len(h)) % HELD_BACK == HELD_BACK - 1
    gram = h[~judge].T @ h[~judge]
    damping = folded.damp * np.diag(gram).mean() * np.eye(len(gram))
    solved = np.linalg.solve(gram + damping, h[~judge].T @ (h @ w.T + more)[~judge] + damping @ w.T).T
    found = made.stored[next(key for key in made.stored if key.endswith("down_proj.weight"))]
    assert found.numpy() == pytest.approx(solved, abs=1e-3)
    left = more[judge] - h[judge] @ (solved - w).T
    assert folded.error == pytest.approx((left**2).sum() / (more[judge] ** 2).sum(), rel=1e-2)
    assert folded.error < 1


@pytest.mark.parametrize(("name", "does"), [("llama", True), ("phi3", True), ("gemma2", False), ("qwen3_moe", False)])
@torch.no_grad()
def test_a_matrix_behind_a_norm_or_in_experts_does_not_add_up(name: str, does: bool, tmp_path: Path) -> None:
    streamed = stream(random_folder(tiny_config(name), tmp_path) / "model")
    acts = streamed.embed([torch.randint(3, 90, (2, 9))])
    block = streamed.block(0)
    weight = last_matrix(block.weights, 32)
    assert (weight is not None and adds_up(block, acts, weight, block.view(weight))) == does


def test_what_is_folded_brings_the_model_closer_to_the_whole_one(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama", num_hidden_layers=4))
    folder = saved(model, tmp_path)
    losses: list[float] = []
    for refit in (False, True):
        report = shrink(folder, blocks="3", refit=refit, overwrite=True)
        losses.append((logits(load(folder / "out")) - logits(model)).square().mean().item())
        assert ("is taken over" in dict(report.findings())["blocks"]) == refit
    assert losses[1] < losses[0]


def test_matching_aims_at_what_the_blocks_that_went_would_have_made(tmp_path: Path) -> None:
    report = shrink(random_folder(tiny_config("llama", num_hidden_layers=4), tmp_path), blocks="3", match_steps=8)
    matched = [block for block in report.blocks if block.match]
    assert [block.rows["blocks"]["gap"] for block in matched] == [[one.index] for one in report.reductions[0].removed]
    assert matched[0].match is not None and matched[0].match["after"] <= matched[0].match["before"]
    load(tmp_path / "out")
