"""The last matrix of the last block goes by the logits of the source, where nothing but the head is behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsparse.models.streamed import Activations, Block, StreamedModel
from llmsparse.shrinking.logit_fit import HELD, Tokens, fit_to_logits, tokens_at_most
from tests.architectures import VOCABULARY, random_model, stream, tiny_config
from tests.shrinking.small_models import random_folder, saved, shrink


def last_block(folder: Path) -> tuple[StreamedModel, Block, Activations, list[torch.Tensor]]:
    """A model of one block, the block with half its channels silent, what enters it, and what it gave when it was whole."""
    streamed = stream(folder / "model")
    acts = streamed.embed(list(load_file(folder / "windows.safetensors")["input_ids"].split(2)))
    block = streamed.block(0)
    aims = block.run(acts).hidden
    down = next(weight for weight in block.weights if weight.name.endswith("down_proj"))
    value = block.view(down).clone()
    value[:, ::2] *= 0.1
    block.stored = block.stored | {down.key: value}
    block.reload()
    return streamed, block, acts, aims


@pytest.fixture
def narrow(tmp_path: Path) -> tuple[StreamedModel, Block, Activations, list[torch.Tensor]]:
    model: Any = random_model(tiny_config("llama", num_hidden_layers=1))
    model.lm_head.weight.data *= 20  # so that logits are no uniform noise
    return last_block(saved(model, tmp_path))


@torch.no_grad()
def test_the_fit_brings_logits_closer_on_tokens_held_back_and_is_stored(
    narrow: tuple[StreamedModel, Block, Activations, list[torch.Tensor]],
) -> None:
    model, block, acts, aims = narrow
    before = dict(block.stored)
    found = fit_to_logits(block, acts, model, aims)
    assert found is not None and found["after"] < 0.7 * found["before"]
    changed = [key for key, tensor in block.stored.items() if not torch.equal(tensor, before[key])]
    assert [key.rpartition(".layers.0.")[2] for key in changed] == ["mlp.down_proj.weight"]

    def divergence() -> float:
        pairs = [(model.logits(aim), model.logits(out)) for aim, out in zip(aims, block.run(acts).hidden, strict=True)]
        return float(sum((a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum() for a, b in pairs[::8]))

    tokens = sum(aim[..., 0].numel() for aim in aims[::8])
    assert divergence() / tokens == pytest.approx(found["after"], rel=1e-2), "the block computes with what is stored"


def test_gradient_and_curvature_are_those_of_the_divergence(
    narrow: tuple[StreamedModel, Block, Activations, list[torch.Tensor]],
) -> None:
    model, _, _, aims = narrow
    generator = torch.Generator().manual_seed(0)
    h, output = torch.randn(9, 5, generator=generator), aims[0].flatten(0, 1)[:9]
    tokens = Tokens(model, h, output, aims[1].flatten(0, 1)[:9])
    change = 0.1 * torch.randn(output.shape[1], 5, generator=generator)
    direction = torch.randn(change.shape, generator=generator)
    step = 1e-2
    slope = (tokens.divergence(change + step * direction) - tokens.divergence(change - step * direction)) / (2 * step)
    assert slope == pytest.approx((tokens.gradient(change) * direction).sum().item(), rel=2e-2)

    own = Tokens(model, h, output, output + h @ change.T)  # at its aim the second derivative is all of JᵀFJ
    ends = [own.gradient(change + sign * step * direction) for sign in (1, -1)]
    wanted = (ends[0] - ends[1]) / (2 * step)
    assert (own.curvature(change, direction) - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe"])
@torch.no_grad()
def test_what_does_not_add_up_is_left_alone(name: str, tmp_path: Path) -> None:
    folder = random_folder(tiny_config(name), tmp_path)
    streamed = stream(folder / "model")
    acts = streamed.embed(list(load_file(folder / "windows.safetensors")["input_ids"].split(2)))
    block = streamed.block(len(streamed.block_names) - 1)
    before = dict(block.stored)
    assert fit_to_logits(block, acts, streamed, [hidden + 1 for hidden in acts.hidden]) is None
    assert all(tensor is before[key] for key, tensor in block.stored.items())


def test_zeros_of_a_sparse_matrix_stay(narrow: tuple[StreamedModel, Block, Activations, list[torch.Tensor]]) -> None:
    model, block, acts, aims = narrow
    down = next(weight for weight in block.weights if weight.name.endswith("down_proj"))
    block.stored = block.stored | {down.key: block.view(down) * (torch.arange(block.view(down).shape[1]) % 2)}
    block.reload()
    assert fit_to_logits(block, acts, model, aims) is None


def test_a_large_matrix_is_fitted_on_fewer_tokens(
    narrow: tuple[StreamedModel, Block, Activations, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokens_at_most(1536, 576) == 16384
    assert 8192 < tokens_at_most(11008, 4096) <= HELD // (11008 + 2 * 4096)
    model, block, acts, aims = narrow
    monkeypatch.setattr("llmsparse.shrinking.logit_fit.HELD", 1)
    assert fit_to_logits(block, acts, model, aims) is None, "none are left to judge by"


def test_narrower_models_are_fitted_to_logits_and_say_so(tmp_path: Path) -> None:
    model: Any = random_model(tiny_config("llama"))
    model.lm_head.weight.data *= 20
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 20
    folder = saved(model, tmp_path)
    ids = torch.randint(3, VOCABULARY, (80, 16), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, folder / "windows.safetensors")
    report = shrink(folder, ffn="50%", calibration_samples=80)
    fitted = [block.logits for block in report.blocks]
    assert all(one is None for one in fitted[:-1]) and fitted[-1] is not None
    assert "nats" in dict(report.findings())["logits"]
    matched = shrink(folder, ffn="50%", calibration_samples=80, refit=False, match_steps=2, overwrite=True).blocks
    assert all(block.logits is None for block in matched), "only a refit fits them"
    assert [block.match and block.match["of"] for block in matched] == ["output"] * (len(matched) - 1) + ["logits"]
