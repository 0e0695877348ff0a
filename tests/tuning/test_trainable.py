"""What moves and what does not: routers, experts, low-rank additions, zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llmsparse


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in old.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in new.items()
    }
    return {key for key in old if not torch.equal(old[key], new[key])}


def tuned(folder: Path, out: Path, keys: dict[str, Any], **options: Any) -> set[str]:
    llmsparse.tune(model=str(folder), output=str(out), **keys | options)
    return changed(folder, out)


@pytest.mark.parametrize("name", ["glm4_moe", "mixtral"])
def test_router_alone_and_nothing_else_moves(
    name: str, mixtures: dict[str, Path], keys: dict[str, Any], tmp_path: Path
) -> None:
    moved = tuned(mixtures[name], tmp_path / "out", keys, train="router")
    place = "mlp.gate.weight" if name == "glm4_moe" else "block_sparse_moe.gate.weight"
    assert moved == {f"model.layers.{layer}.{place}" for layer in range(2)}


def test_experts_and_routers_move_and_attention_norms_embeddings_and_biases_do_not(
    moe: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    moved = tuned(moe, tmp_path / "out", keys)
    assert moved == {key for key in weights(moe) if "experts" in key or key.endswith("mlp.gate.weight")}


def test_a_router_stays_as_small_as_it_was_so_that_experts_weigh_alike(
    moe: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    tuned(moe, tmp_path / "out", keys, router_learning_rate=0.01)
    for key, router in weights(moe).items():
        if key.endswith("mlp.gate.weight"):
            assert weights(tmp_path / "out")[key].norm() < 3 * router.norm()


def test_low_rank_changes_have_the_rank_asked_for(moe: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    moved = tuned(moe, tmp_path / "out", keys, train="lora", lora_rank=2)
    before, after = weights(moe), weights(tmp_path / "out")
    matrices = [key for key in moved if "experts" in key]
    assert len(matrices) == 2 * 3 * (6 + 1)
    for key in matrices:
        values = torch.linalg.svdvals(after[key] - before[key])
        stacked = 2 if "shared" in key or "down" in key else 4  # gate and up of an expert share one matrix in the model
        assert values[stacked:].max() < 1e-3 * values[0], key


@pytest.mark.parametrize("train", ["experts", "lora"])
def test_a_pruned_mixture_keeps_every_zero(
    train: str, moe: Path, notes: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    llmsparse.prune(
        model=str(moe), output=str(tmp_path / "pruned"), method="magnitude", pattern="2:4", only=["*experts*"],
        calibration=str(notes), calibration_samples=8, seq_len=32, match_steps=0, device="cpu",
    )  # fmt: skip
    moved = tuned(tmp_path / "pruned", tmp_path / "out", keys, train=train)
    before, after = weights(tmp_path / "pruned"), weights(tmp_path / "out")
    for key in (key for key in before if "experts" in key):
        assert key in moved
        assert torch.equal(before[key] == 0, after[key] == 0), key
        assert (after[key].view(torch.int32) != torch.tensor(-0.0).view(torch.int32)).all()


def test_neurons_that_pad_an_expert_stay_empty(
    tiny_llama: Callable[..., Path], notes: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    """60 neurons in 4 experts stored as 16 each."""
    dense = tiny_llama(tmp_path / "dense", ffn=60, layers=1)
    llmsparse.factorize(
        model=str(dense), output=str(tmp_path / "moe"), calibration=str(notes), experts=4, shared=1, active=1,
        calibration_samples=12, seq_len=32, router_steps=5, device="cpu",
    )  # fmt: skip
    tuned(tmp_path / "moe", tmp_path / "out", keys, teacher=str(dense))
    after = weights(tmp_path / "out")
    padded = [key for key in after if "experts" in key and "up_proj" in key and not after[key][-1].any()]
    assert len(padded) >= 2
    for key in padded:
        assert not after[key.replace("up_proj", "gate_proj")][-1].any()
        assert not after[key.replace("up_proj", "down_proj")][:, -1].any()


def test_masters_are_fp32_so_that_small_steps_add_up_in_a_bfloat16_checkpoint(
    tiny_llama: Callable[..., Path], notes: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    """40 steps of 1e-5 on weights around 0.1, whose neighbours in bfloat16 lie 5e-4 away: rounded after each step, none
    of these could ever change."""
    dense = tiny_llama(tmp_path / "dense", dtype=torch.bfloat16, layers=1)
    llmsparse.factorize(
        model=str(dense), output=str(tmp_path / "moe"), calibration=str(notes), experts=4, shared=1, active=1,
        calibration_samples=12, seq_len=32, router_steps=5, device="cpu",
    )  # fmt: skip
    small = {"learning_rate": 1e-5, "steps": 40, "warmup": 0, "final_rate": 1.0}
    tuned(tmp_path / "moe", tmp_path / "out", keys, teacher=str(dense), **small)
    key = "model.layers.0.mlp.shared_experts.up_proj.weight"
    before, after = weights(tmp_path / "moe")[key], weights(tmp_path / "out")[key]
    assert before.dtype == after.dtype == torch.bfloat16
    large = (before.abs() > 0.07) & (before.abs() < 0.125)
    assert torch.equal((before - 1e-5).bfloat16()[large], before[large])
    assert (before != after)[large].float().mean() > 0.1
