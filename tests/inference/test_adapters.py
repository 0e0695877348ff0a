"""LoRA adapters of PEFT on packed models: trained, stored, loaded; merged only into a dense one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import windows
from sparse import one_line
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.errors import RecipeError

peft: Any = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
Folders = Callable[..., tuple[Path, Path]]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_fc", "c_proj"]}


def model_of(folder: Path, backend: str | None) -> Any:
    options = {} if backend is None else {"quantization_config": llmsparse.SparseConfig(backend=backend)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def adapted(model: Any, target: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=target, task_type="CAUSAL_LM", r=4, **options))


def trained(model: Any, steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the adapter."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    (ids,) = windows((2, 9))
    losses: list[float] = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("backend", ["dense", "dense-lowmem", "cpu-bitmask"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_is_trained_as_on_the_dense_model(
    family: str, backend: str, options: dict[str, Any], folders: Folders
) -> None:
    pruned, packed = folders(family)
    expected, of_dense = trained(adapted(model_of(pruned, None), TARGETS[family], **options))
    losses, of_packed = trained(adapted(model_of(packed, backend), TARGETS[family], **options))
    assert losses[-1] < losses[0] and losses == pytest.approx(expected, rel=1e-4)
    assert of_dense.keys() == of_packed.keys()
    for name, tensor in of_dense.items():
        torch.testing.assert_close(of_packed[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_linear_finds_the_layers_that_it_finds_in_the_dense_model(family: str, folders: Folders) -> None:
    counts = [adapted(model_of(folder, None), "all-linear").get_nb_trainable_parameters() for folder in folders(family)]
    assert counts[0][0] == counts[1][0] > 0


def test_an_adapter_is_stored_and_loaded_onto_the_packed_folder(folders: Folders, tmp_path: Path) -> None:
    model = adapted(model_of(folders("llama")[1], "cpu-bitmask"), TARGETS["llama"])
    trained(model)
    model.save_pretrained(tmp_path / "adapter")
    (ids,) = windows((1, 5))
    expected = model(input_ids=ids).logits
    again = peft.PeftModel.from_pretrained(model_of(folders("llama")[1], "cpu-bitmask"), tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(by_name(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("backend", ["dense", "cpu-bitmask"])
def test_merging_into_packed_weights_is_refused_and_into_dense_ones_works(
    backend: str, safe: bool, folders: Folders
) -> None:
    model = adapted(model_of(folders("llama")[1], backend), TARGETS["llama"])
    trained(model)
    (ids,) = windows((1, 5))
    expected = model(input_ids=ids).logits
    with pytest.raises(RecipeError, match="would be lost; make the model dense first") as caught:
        model.merge_adapter(safe_merge=safe)
    one_line(caught.value)
    for layer in model.modules():
        if hasattr(layer, "merged_adapters"):
            layer.merged_adapters.clear()  # PEFT notes the merge before it fails
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    model.get_base_model().dequantize()
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_packed_experts_offer_no_parameter_for_an_adapter(folders: Folders) -> None:
    with pytest.raises(ValueError, match="no `target_parameters` found"):  # PEFT's own refusal
        adapted(model_of(folders("mixtral")[1], "cpu-bitmask"), [], target_parameters=["mlp.experts.down_proj"])
