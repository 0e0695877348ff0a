"""What inspect says of tensors and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import random_model, tiny_config
from safetensors.torch import load_file, save_file

import llmsparse
from llmsparse.packing.inspect import pattern_of


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([[1, 2, 3, 4], [5, 6, 7, 8]], "dense"),
        ([[1, 2, 0, 0], [0, 6, 0, 8]], "2:4"),
        ([[1, 0, 0, 4], [0, 6, 0, 8]], "1:2"),
        ([[1, 0, 0, 0], [0, 6, 0, 0]], "1:4"),
        ([[1, 0, 0, 4], [5, 6, 7, 0]], "unstructured"),
        ([[1, 0, 1, 1, 1, 1, 0, 1]], "3:4"),
        ([[1, 0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]], "4:8"),
        ([[1, 1, *[0] * 14], [*[0] * 14, 1, 1]], "2:16"),
        ([[*[1] * 8, *[0] * 8], [*[0] * 8, *[1] * 8]], "8:16"),
        ([[*[1] * 8, *[0] * 24], [*[0] * 24, *[1] * 8]], "8:32"),
        ([[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0, 0, 0]], "2:8"),  # with zeros to spare
        ([[1, 1, 0], [1, 0, 0]], "unstructured"),
    ],
)
def test_the_tightest_pattern_that_holds_is_named(rows: list[list[float]], pattern: str) -> None:
    weight = torch.tensor(rows, dtype=torch.float32)
    assert pattern_of(weight, (weight == 0).float().mean().item()) == pattern


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
def test_zeros_anywhere_are_not_taken_for_a_pattern(sparsity: float) -> None:
    score = torch.rand(256, 512, generator=torch.Generator().manual_seed(0))
    weight = (score >= sparsity).float()
    assert pattern_of(weight, (weight == 0).float().mean().item()) == "unstructured"


def half_of(folder: Path, key: str, dim: int) -> str:
    """Make one weight of a checkpoint 2:4 along a dimension; what inspect calls it."""
    tensors = load_file(folder / "model.safetensors")
    keep = torch.tensor([1, 1, 0, 0]).repeat(tensors[key].shape[dim] // 4)
    tensors[key] *= keep if dim == 1 else keep[:, None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = llmsparse.inspect(str(folder))
    assert found.note is None
    return next(row.pattern for row in found.weights if f"{row.name}.weight" == key)


@pytest.mark.parametrize(("dim", "pattern"), [(0, "unstructured"), (1, "2:4")])
def test_a_pattern_counts_along_the_inputs_of_a_linear_module(
    dim: int, pattern: str, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    assert half_of(tiny_llama(tmp_path / "model"), "model.layers.0.mlp.up_proj.weight", dim) == pattern


@pytest.mark.parametrize(("dim", "pattern"), [(0, "2:4"), (1, "unstructured")])
def test_a_pattern_counts_along_the_inputs_where_the_module_stores_them_first(
    dim: int, pattern: str, tmp_path: Path
) -> None:
    random_model(tiny_config("gpt2")).save_pretrained(tmp_path)
    assert half_of(tmp_path, "transformer.h.0.mlp.c_fc.weight", dim) == pattern


def test_a_folder_without_a_config_is_inspected_along_the_last_dimension_and_says_so(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] *= torch.tensor([1, 1, 0, 0]).repeat(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").unlink()
    found = llmsparse.inspect(str(folder))
    assert {f"{row.name}.weight": row.pattern for row in found.weights}[key] == "2:4"
    assert found.note is not None and "along the last dimension" in found.note and "config.json" in found.note


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
    assert row["sparsity"] == 0.5 and row["pattern"] == "1:2" and row["shape"] == (64, 32)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_8_bits_are_counted_as_they_are(
    dtype: torch.dtype, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key][:, ::2] = 0.0
    coded = tensors | {key: tensors[key].to(dtype)}
    save_file(coded, folder / "model.safetensors", metadata={"format": "pt"})
    (info,) = (
        weight for weight in llmsparse.inspect(str(folder)).weights if weight.name == key.removesuffix(".weight")
    )
    assert info.dtype == str(dtype).removeprefix("torch.") and info.bytes == coded[key].numel()
    assert info.sparsity == pytest.approx((coded[key].float() == 0).float().mean().item()) and info.sparsity >= 0.5
