"""What inspect says of tensors and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmsparse
from llmsparse.inspection import pattern_of


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([[1, 2, 3, 4], [5, 6, 7, 8]], "dense"),
        ([[1, 0, 0, 4], [0, 6, 0, 8]], "2:4"),
        ([[1, 0, 0, 0], [0, 6, 0, 0]], "1:4"),
        ([[1, 0, 0, 4], [5, 6, 7, 0]], "unstructured"),
        ([[1, 0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]], "4:8"),
    ],
)
def test_the_narrowest_pattern_that_holds_is_named(rows: list[list[float]], pattern: str) -> None:
    weight = torch.tensor(rows, dtype=torch.float32)
    assert pattern_of(weight, (weight == 0).float().mean().item()) == pattern


def test_a_pattern_along_the_inputs_is_seen_in_a_transposed_weight() -> None:
    weight = torch.tensor([[1, 0, 0, 4], [0, 6, 7, 0], [1, 0, 2, 0]], dtype=torch.float32)
    assert pattern_of(weight.T.contiguous(), 0.5) == "2:4"


def test_totals_count_every_tensor_with_and_without_embeddings(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key][:, ::2] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = llmsparse.inspect(str(folder))
    total = sum(tensor.numel() for tensor in tensors.values())
    embedding = tensors["model.embed_tokens.weight"].numel()
    zeros = tensors[key].numel() // 2
    assert found.parameters == total and found.bytes == 4 * total
    assert found.sparsity == pytest.approx(zeros / total)
    assert found.sparsity_without_embeddings == pytest.approx(zeros / (total - embedding))
    row = next(row for row in found.to_json()["weights"] if row["name"] == key.removesuffix(".weight"))
    assert row["sparsity"] == 0.5 and row["pattern"] == "2:4" and row["shape"] == (64, 32)
