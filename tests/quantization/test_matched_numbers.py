"""Matching on top of numbers and steps: it begins at what is stored, loses no more, and moves no zero that must stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmsparse
from llmsparse.packing.folder import PackedCheckpoint
from llmsparse.quantization.matching import Numbers, Rounded, spread

SMALL: dict[str, Any] = {"calibration": "builtin", "calibration_samples": 8, "seq_len": 32, "device": "cpu"}


@pytest.fixture
def model(tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(tiny_llama(Path("tiny"), hidden=64, ffn=96, dtype=torch.bfloat16))


def numbers_of(out: int, width: int, group: int, seed: int) -> tuple[torch.Tensor, Numbers]:
    """A weight, and numbers that are not the nearest: feedback has moved some by one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    steps = (0.5 + torch.rand(out, width // group, generator=generator)).to(torch.bfloat16)
    moved = torch.randint(-1, 2, weight.shape, generator=generator)
    q = (weight / spread(steps.float(), weight.shape)).round() + moved
    return weight, Numbers(q.to(torch.int8), steps)


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("group", [8, 24])
def test_it_begins_at_the_numbers_that_are_stored(group: int, rate: float) -> None:
    for seed in range(5):
        weight, held = numbers_of(7, 24, group, seed)
        rounded = Rounded(weight, held, rate, 127)
        latent = rounded.start(weight, held.q.float())
        assert torch.equal(rounded.numbers(latent).q, held.q)
        assert torch.equal(rounded.numbers(latent).steps, held.steps)
        torch.testing.assert_close(rounded(latent), held.q * spread(held.steps.float(), weight.shape))
        near = (weight / spread(held.steps.float(), weight.shape)).abs() % 1  # inside its own cell a weight stays
        inside = (held.q == (weight / spread(held.steps.float(), weight.shape)).round()) & (near < 0.4)
        torch.testing.assert_close(latent[inside], weight[inside])


def test_gradients_go_straight_through_to_numbers_and_by_the_number_to_steps() -> None:
    """Ŵ = s · q: by hand dL/dw = g, and dL/ds = Σ q · g over the columns that share it."""
    weight, held = numbers_of(3, 8, 4, seed=1)
    rounded = Rounded(weight, held, 0.0, 127)
    latent = rounded.start(weight, held.q.float()).requires_grad_()
    gradient = torch.randn(weight.shape)
    (rounded(latent) * gradient).sum().backward()
    torch.testing.assert_close(latent.grad, gradient)
    torch.testing.assert_close(rounded.steps.grad, (held.q * gradient).view(3, 2, 4).sum(2))


def test_blocks_lose_no_more_and_mostly_less_in_about_as_many_bits(model: str) -> None:
    report = llmsparse.quantize(model, bits=2.3, output="out", match_steps=40, **SMALL)
    records = [block.match for block in report.blocks if block.match]
    assert len(records) == 2 and all(record["after"] <= record["before"] for record in records)
    assert any(record["after"] < 0.98 * record["before"] for record in records)
    assert report.bits == pytest.approx(2.3, abs=0.05)
    packed = PackedCheckpoint(Path("out"))
    packed.verify()
    told = {row["name"]: row["zeros"] for row in json.loads(Path("out/llmsparse_report.json").read_text())["weights"]}
    for name, zeros in told.items():
        q = packed.weight(f"{name}.weight").numbers()  # type: ignore[union-attr]
        assert zeros == pytest.approx(1 - int(q.count_nonzero()) / q.numel())


def test_zeros_of_a_sparse_model_stay(model: str) -> None:
    llmsparse.prune(model, sparsity=0.6, method="magnitude", match_steps=0, output="pruned", **SMALL)
    llmsparse.quantize("pruned", values="int4", match_steps=10, output="out", **SMALL)
    llmsparse.unpack("out", "dense")
    before, after = load_file("pruned/model.safetensors"), load_file("dense/model.safetensors")
    for key, weight in before.items():
        if "proj" in key:
            assert not after[key][weight == 0].any(), key
            assert PackedCheckpoint(Path("out")).weight(key).numbers().abs().max() <= 7  # type: ignore[union-attr]
