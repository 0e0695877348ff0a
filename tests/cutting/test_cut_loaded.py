"""A loaded model that leaves inputs out, when it is trained, copied, loaded anew, or held by accelerate's hooks."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.errors import MachineError
from llmsparse.inference.cut_layers import cut_model
from llmsparse.models.thresholds import Thresholds
from tests.architectures import VOCABULARY, save_random, tiny_config

IDS = torch.arange(20).view(1, 20) * 7 % VOCABULARY
SMALL: dict[str, Any] = {"calibration_samples": 6, "seq_len": 32, "batch_size": 3, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    ids = torch.randint(3, VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, made / "tokens.safetensors")
    dense = save_random(tiny_config(request.param), made / "dense")
    text = str(made / "tokens.safetensors")
    llmsparse.activations(dense, output=made / "cut", sparsity=0.5, allocation="uniform", calibration=text, **SMALL)
    return made / "cut"


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=llmsparse.SparseConfig()
    )


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def is_same_for_few_tokens(model: Any) -> bool:
    """Whether the columns that are read for few tokens are of the weights that more tokens are multiplied with."""
    return torch.allclose(logits(model, IDS[:, :2]), logits(model)[:, :2], atol=1e-4)


def places(model: nn.Module) -> list[tuple[int, int]]:
    """Where the columns of each layer lie, and where its weight does."""
    found: list[tuple[int, int]] = []
    for module in model.modules():
        held: Any = vars(module)
        if held.get("columns") is not None:
            found.append((held["columns"].values.data_ptr(), module.get_parameter("weight").data_ptr()))
        for leaf, stack in held.get("cut", {}).items():
            found += [(stack.columns[0].values.data_ptr(), module.get_parameter(leaf).data_ptr())] * bool(stack.columns)
    return found


@pytest.mark.parametrize("tokens", [1, 20])
def test_it_trains_for_more_than_a_step_with_the_gradient_of_every_weight_that_ran(folder: Path, tokens: int) -> None:
    model, ids = loaded(folder), IDS[:, :tokens]
    for _ in range(2):
        model(ids).logits.square().mean().backward()
    names = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not names
    inner = [parameter.grad for name, parameter in model.named_parameters() if "mlp" in name and "router" not in name]
    assert all(bool(grad.any()) for grad in inner)


def test_a_copy_runs_its_own_weights_and_holds_no_others(folder: Path) -> None:
    model = loaded(folder)
    before = logits(model, IDS[:, :2])
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, IDS[:, :2]), before)
    assert len(places(other)) == len(places(model)) > 0
    assert all(columns == weight for columns, weight in places(other))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "down_proj" in name:
                parameter.mul_(-2)
    assert is_same_for_few_tokens(other) and not torch.allclose(logits(other, IDS[:, :2]), before, atol=1e-3)
    assert torch.equal(logits(model, IDS[:, :2]), before)


def test_weights_and_biases_that_take_the_place_of_others_run_for_few_tokens_too(folder: Path) -> None:
    model = loaded(folder)
    before = logits(model, IDS[:, :2])
    state = {
        name: held.clone(memory_format=torch.contiguous_format) + ("down_proj" in name)
        for name, held in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    assert is_same_for_few_tokens(model) and not torch.allclose(logits(model, IDS[:, :2]), before, atol=1e-3)


@pytest.mark.parametrize("there", [True, False])
def test_under_hooks_of_accelerate_it_leaves_the_same_out(folder: Path, there: bool) -> None:
    model = stock(folder)
    for module in [one for one in model.modules() if one._parameters]:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    model = cut_model(model, folder)
    if not there:
        for module in model.modules():
            if hasattr(module, "_hf_hook"):
                remove_hook_from_module(module)
    assert torch.allclose(logits(model), logits(loaded(folder)), atol=1e-5)
    assert not torch.allclose(logits(model), logits(stock(folder)), atol=1e-3)


def test_offloaded_weights_are_one_line(folder: Path) -> None:
    model = stock(folder)
    with pytest.raises(MachineError, match="is offloaded"):
        cut_model(model.to("meta"), folder)


def test_experts_are_looked_at_one_by_one() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def weights() -> Iterator[Tensor]:
        for _ in range(4):
            assert sum(one() is not None for one in alive) <= 1
            weight = torch.randn(8, 4)
            alive.append(weakref.ref(weight))
            yield weight

    rules = Thresholds("wina", "none", 0.5, {"experts": {"threshold": [0.1] * 4}}).apply_experts(
        "experts", weights(), 4
    )
    assert len(rules) == 4
