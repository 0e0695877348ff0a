"""Inputs in another order: the whole model computes what it did, in the same shapes, and what does not fold is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_random, stream, tiny_config, windows
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmsparse.models.streamed import StreamedModel
from llmsparse.models.tap import Tap
from llmsparse.pruning.options import PruneOptions
from llmsparse.pruning.permutation.fold import folds_of
from llmsparse.pruning.permutation.order import retained
from llmsparse.pruning.permutation.permuted import Permuted
from llmsparse.pruning.permutation.reorder import reorder_block
from llmsparse.pruning.permutation.trial import folding_layout
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.pruning.selection import choose_weights
from llmsparse.runs.progress import Silent

CPU = torch.device("cpu")


def options_of(model: StreamedModel, folds: Any) -> PruneOptions:
    return PruneOptions(
        device=CPU, dtype=torch.float32, seed=0, match_steps=0, fading=False, true_sequential=False, keep_zeros=False,
        calibration_tokens=256, statistics_budget=2**30, model=model, folds=folds,
    )  # fmt: skip


def reordered(folder: Path, method: str = "wanda", **keys: Any) -> tuple[dict[str, Tensor], list[Permuted]]:
    """All tensors of the blocks as they are when nothing is pruned yet, and what became of each matrix."""
    model = stream(folder)
    choices = choose_weights(PruneRecipe(model=str(folder), pattern="2:4", method=method, **keys), model)
    folds = folds_of(model, choices)
    options = options_of(model, folds)
    acts, tensors, rows = model.embed(windows((4, 32), (4, 32))), dict[str, Tensor](), list[Permuted]()
    for block in model.blocks():
        rows += reorder_block(block, acts, choices[block.name], folds[block.name], options, Silent())
        tensors |= block.stored
        block.run(acts, into=acts)
    return tensors, rows


def original(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


UNFOLDED = {  # a gate that each channel has of its own, or a state space, stands between
    "qwen3_next": ["linear_attn.out_proj", "self_attn.o_proj"],
    "jamba": ["mamba.out_proj", "mamba.out_proj"],
}
FAMILIES = [
    "llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox", "bloom", "falcon", "mixtral", "qwen3_moe", "gpt_oss",
    "granitemoe", "llama4_text", "deepseek_v3", *UNFOLDED,
]  # fmt: skip


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_it_did(family: str, method: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    folder = save_random(config, tmp_path / "model")
    made, rows = reordered(folder, method)
    before = original(folder)
    assert {key: tensor.shape for key, tensor in made.items()} == {key: before[key].shape for key in made}
    assert any(not torch.equal(tensor, before[key]) for key, tensor in made.items())
    (tmp_path / "made").mkdir()
    config.save_pretrained(tmp_path / "made")
    save_file(
        {key: tensor.contiguous() for key, tensor in (before | made).items()},
        tmp_path / "made" / "model.safetensors",
        {"format": "pt"},
    )
    ids = windows((2, 24), seed=7)[0]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "made")(ids).logits
    assert (found - wanted).norm() / wanted.norm() < 1e-5
    assert all(row.difference < 1e-5 and row.after >= row.before for row in rows if row.folds)
    assert [row.name.partition("layers.")[2][2:] for row in rows if not row.folds] == UNFOLDED.get(family, [])
    assert sum(row.folds for row in rows) + len(UNFOLDED.get(family, [])) >= 2 * config.num_hidden_layers


def test_heads_keep_their_channels_and_groups_their_queries(tmp_path: Path) -> None:
    """What enters the output projection comes in the same heads, in the same order in all heads of a group."""
    folder = save_random(tiny_config("llama"), tmp_path / "model")
    made, _ = reordered(folder, only="*o_proj")
    before = original(folder)
    values, output = (f"model.layers.0.self_attn.{name}.weight" for name in ("v_proj", "o_proj"))
    for group in range(2):
        rows = before[values][8 * group : 8 * group + 8]
        order = [int((rows == row).all(1).nonzero()) for row in made[values][8 * group : 8 * group + 8]]
        assert sorted(order) == list(range(8))
        for head in (2 * group, 2 * group + 1):
            columns = slice(8 * head, 8 * head + 8)
            assert torch.equal(made[output][:, columns], before[output][:, columns][:, order])
    untouched = [key for key in made if key not in (values, output) and "layers.0" in key]
    assert all(torch.equal(made[key], before[key]) for key in untouched)


def test_what_is_kept_is_told_of_the_energy_at_the_output(tmp_path: Path) -> None:
    """Σ (w ‖x‖)² of the mask over that of all weights, ‖x‖ over the tokens of the batches."""
    folder = save_random(tiny_config("llama", num_hidden_layers=1), tmp_path / "model")
    model = stream(folder)
    acts, squares = model.embed(windows((4, 32), (4, 32))), list[Tensor]()
    block = model.block(0)
    with Tap(block, lambda slot, x: squares.append(x.square().sum(0)) if "down_proj" in slot[0] else None):
        block.run(acts)
    _, rows = reordered(folder, only="*down_proj")
    score = original(folder)["model.layers.0.mlp.down_proj.weight"].square() * torch.stack(squares).sum(0)
    assert [row.before for row in rows] == pytest.approx([retained(score, 2, 4) / score.sum().item()], rel=1e-5)


def test_heads_that_groups_of_four_do_not_divide_keep_their_order(tmp_path: Path) -> None:
    folder = save_random(tiny_config("llama", head_dim=6, num_hidden_layers=1), tmp_path / "model")
    _, rows = reordered(folder)
    names = {row.name.rpartition(".")[2]: row.folds for row in rows}
    assert names == {"o_proj": False, "down_proj": True}


def follows(x: Tensor, mlp: Any) -> Tensor:
    return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)


OTHERWISE: dict[str, tuple[Callable[[Tensor, Any], Tensor], int | None]] = {
    "as it is": (lambda x, mlp: mlp.down_proj(follows(x, mlp)), 0),
    "something else reads the channels": (lambda x, mlp: mlp.down_proj(follows(x, mlp)) + mlp.up_proj(x)[..., :1], None),
    "the channels are scaled in their old order": (
        lambda x, mlp: 0 * mlp.down_proj(follows(x, mlp) * torch.arange(1.0, mlp.down_proj.in_features + 1)), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", OTHERWISE)
def test_channels_move_only_where_what_enters_and_what_comes_out_follow(how: str, tmp_path: Path) -> None:
    folder = save_random(tiny_config("llama"), tmp_path / "model")
    model = stream(folder)
    choices = choose_weights(PruneRecipe(model=str(folder), pattern="2:4", only="*down_proj"), model)
    (fold,) = folds_of(model, choices)[model.block_names[0]]
    acts, block = model.embed(windows((4, 32))), model.block(0)
    forward, wanted = OTHERWISE[how]
    mlp = block.module.get_submodule("mlp")
    mlp.forward = lambda x: forward(x, mlp)
    assert folding_layout(block, acts, fold) == wanted


def test_each_expert_has_an_order_of_its_own(tmp_path: Path) -> None:
    folder = save_random(tiny_config("mixtral"), tmp_path / "model")
    made, _ = reordered(folder, only="*w2")
    before = original(folder)
    orders = [
        [int((before[key] == row).all(1).nonzero()) for row in made[key]] for key in made if key.endswith("w1.weight")
    ]
    assert len(orders) == 8 and all(sorted(order) == list(range(48)) for order in orders)
    assert len({tuple(order) for order in orders}) == 8


def test_a_model_in_bf16_stays_itself_too(tmp_path: Path) -> None:
    folder = save_random(tiny_config("llama", dtype="bfloat16"), tmp_path / "model")
    made, rows = reordered(folder)
    assert all(row.folds and row.difference < 0.02 for row in rows)
    assert {tensor.dtype for tensor in made.values()} == {tensor.dtype for tensor in original(folder).values()}
