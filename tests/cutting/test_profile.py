"""How sparse activations are, against numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import RecipeError


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("profile") / "model")


def test_the_figures_are_those_of_the_inputs(model: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, 384, (3, 20), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "tokens.safetensors")
    found = llmsparse.profile(model, tmp_path / "tokens.safetensors", samples=3, batch_size=2, device="cpu")
    seen: dict[str, np.ndarray] = {}
    whole = AutoModelForCausalLM.from_pretrained(model)
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1).numpy()})
            )
    with torch.no_grad():
        whole(ids)
    assert found.tokens == 60 and list(found.blocks) == ["model.layers.0", "model.layers.1"]
    for matrix in (one for some in found.blocks.values() for one in some):
        x = np.abs(seen[matrix.name])
        score = np.sort(x * np.linalg.norm(whole.get_submodule(matrix.name).weight.detach().numpy(), axis=0), axis=1)
        half = score[:, x.shape[1] // 2 :].sum(1) / score.sum(1)
        assert matrix.half_holds == pytest.approx(half.mean(), abs=1e-5)
        assert matrix.near_zero == pytest.approx((x <= 0.01 * x.max(1, keepdims=True)).mean(), abs=2e-3)
    lazy = found.lazy("model.layers.0")
    assert lazy is not None and lazy.name == "model.layers.0.mlp.down_proj"


def test_the_command_prints_a_table_or_one_document(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--calibration-samples", "2", "--seq-len", "16", "--device", "cpu", "-q"]
    assert main(["profile", str(model), *options]) == 0
    assert "lazy units" in capsys.readouterr().out
    assert main(["profile", str(model), *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["lazy"].keys() == {"model.layers.0", "model.layers.1"} and len(said["blocks"]["model.layers.0"]) == 7


def test_no_windows_is_one_line(model: Path) -> None:
    with pytest.raises(RecipeError, match="samples: got 0"):
        llmsparse.profile(model, samples=0)
