"""A packed model in the hands of those who count, train beside, edit or undo it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import windows
from safetensors.torch import load_file
from sparse import assert_same_tensors, one_line
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.inference.counting import held_bytes
from llmsparse.inference.linear import SparseLinear
from llmsparse.inference.packed_experts import SparseExperts, packed_weights

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

BACKENDS = ["dense", "dense-lowmem", "cpu-bitmask"]
FAMILIES = ["llama", "gpt2", "phi", "falcon", "mixtral", "gpt_oss", "deepseek_v3"]
Folders = Callable[..., tuple[Path, Path]]


def packed_model(folder: Path, backend: str = "dense", optimize: str = "memory", **options: Any) -> Any:
    config = llmsparse.SparseConfig(backend=backend, optimize=optimize)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def dense_model(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any, *shape: int) -> Tensor:
    (ids,) = windows(shape or (2, 9))
    return model(ids, use_cache=False).logits


# counting


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_dense_model(family: str, folders: Folders) -> None:
    pruned, packed = folders(family)
    dense, model = dense_model(pruned), packed_model(packed)
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_memory_counts_what_the_backends_hold(family: str, folders: Folders) -> None:
    pruned, packed = folders(family)
    dense = dense_model(pruned).get_memory_footprint()
    stored = sum(tensor.nbytes for file in packed.glob("*.safetensors") for tensor in load_file(file).values())
    kept = packed_model(packed, "dense-lowmem")
    rope = kept.get_memory_footprint() - sum(tensor.nbytes for tensor in kept.state_dict().values())
    assert kept.get_memory_footprint() == stored + rope  # to the byte: it holds what is on disk
    masks = sum(tensor.nbytes for name, tensor in kept.state_dict().items() if name.endswith("_mask"))
    assert packed_model(packed, "dense").get_memory_footprint() == dense + masks
    small, fast = (packed_model(packed, "cpu-bitmask", way).get_memory_footprint() for way in ("memory", "speed"))
    copies = sum(choice.dense_bytes for choice in llmsparse.explain(kept).choices)
    assert small < dense and fast == small + copies
    assert kept.get_memory_footprint(return_buffers=False) < kept.get_memory_footprint()


def test_a_copy_counts_itself(folders: Folders) -> None:
    model = packed_model(folders("llama")[1], "dense-lowmem")
    twin = copy.deepcopy(model)
    before = model.get_memory_footprint()
    twin.model.layers[0].mlp.up_proj = nn.Identity()
    assert model.get_memory_footprint() == before > twin.get_memory_footprint()


# gradients


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("optimize", ["memory", "speed"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["phi", "gpt2", "gpt_oss"])
def test_biases_get_the_gradients_of_the_dense_model(
    family: str, backend: str, optimize: str, tokens: int, folders: Folders
) -> None:
    pruned, packed = folders(family)
    grads: list[dict[str, Tensor]] = []
    for model in (
        dense_model(pruned, dtype=torch.float32),
        packed_model(packed, backend, optimize, dtype=torch.float32),
    ):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        (ids,) = windows((1, tokens))
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0] and grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral", "gpt_oss"])
def test_gradients_reach_what_stands_before(family: str, backend: str, folders: Folders) -> None:
    if family == "falcon" and backend == "cpu-bitmask":
        backend = "auto"  # its layers multiply in a way of their own
    pruned, packed = folders(family)
    grads: list[Tensor] = []
    for model in (dense_model(pruned, dtype=torch.float32), packed_model(packed, backend, dtype=torch.float32)):
        model.requires_grad_(False)
        (ids,) = windows((2, 5))
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        assert embedded.grad is not None
        grads.append(embedded.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["dense-lowmem", "cpu-bitmask"])
def test_a_graph_keeps_no_unpacked_weight(backend: str, folders: Folders) -> None:
    model = packed_model(folders("llama")[1], backend)
    layer, kept = model.model.layers[0].mlp.up_proj, list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        layer(torch.ones(3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)).sum()
    assert not [one for one in kept if one.numel() >= layer.in_features * layer.out_features]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_as_in_a_dense_layer(backend: str, folders: Folders) -> None:
    layer = packed_model(folders("llama")[1], backend, dtype=torch.float32).model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    for wanted in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x.clone().requires_grad_(wanted))
            assert torch.equal(y, nn.functional.linear(x, layer.weight)) and y.dtype == torch.bfloat16


# edits


def test_an_edit_that_would_be_lost_is_refused(folders: Folders) -> None:
    model = packed_model(folders("mixtral")[1], "cpu-bitmask")
    layer, experts = model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.experts
    assert isinstance(layer, SparseLinear) and isinstance(experts, SparseExperts)
    for module, leaf in ((layer, "weight"), (experts, "down_proj")):
        held = getattr(module, leaf).clone()
        with pytest.raises(RecipeError, match=rf"{leaf} is packed, so an edit .* would be lost") as caught:
            setattr(module, leaf, nn.Parameter(torch.zeros(held.shape)))
        one_line(caught.value)
        with pytest.raises(RecipeError, match="would be lost"), torch.no_grad():
            getattr(module, leaf).mul_(2)
        assert torch.equal(getattr(module, leaf), held)
    with pytest.raises(RecipeError, match=r"q_proj\.weight is packed, and packed weights are not trained") as caught:
        layer.requires_grad_()
    one_line(caught.value)
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()  # transformers' own refusal


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_dict_is_loaded_as_it_was_saved(family: str, backend: str, folders: Folders, tmp_path: Path) -> None:
    one = packed_model(folders(family)[1], backend)
    other = packed_model(folders(family)[1], backend)
    changed = {name: 2 * tensor if tensor.is_floating_point() else tensor for name, tensor in one.state_dict().items()}
    other.load_state_dict(changed)
    assert not torch.equal(logits(other), logits(one))
    now = other.state_dict()
    assert now.keys() == changed.keys() and all(torch.equal(now[name], changed[name]) for name in now)
    other.load_state_dict(one.state_dict())
    assert torch.equal(logits(other), logits(one))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_another_state_dict_is_refused_or_named(family: str, folders: Folders) -> None:
    pruned, packed = folders(family)
    model = packed_model(packed, "cpu-bitmask")
    for strict in (True, False):
        with pytest.raises(RecipeError, match="a dense weight for a layer that is packed") as caught:
            model.load_state_dict(dense_model(pruned).state_dict(), strict=strict)
        one_line(caught.value)
    state = model.state_dict()
    name = next(name for name in state if name.endswith("_mask")).removesuffix("_mask")
    state[f"{name}_mask"] = state[f"{name}_mask"] ^ 1
    with pytest.raises(CheckpointError, match=f"{name}: mask and offsets disagree"):
        model.load_state_dict(state)
    rest = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(name)}
    assert model.load_state_dict(rest, strict=False).missing_keys == [name]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        model.load_state_dict(rest)


# dense again


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dequantized_it_is_the_dense_model(family: str, backend: str, folders: Folders, tmp_path: Path) -> None:
    if family == "falcon" and backend == "cpu-bitmask":
        backend = "auto"
    pruned, packed = folders(family)
    dense, model = dense_model(pruned), packed_model(packed, backend)
    assert model.dequantize() is model
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in dense.named_modules()
    ]
    mine, others = dict(model.named_parameters()), dict(dense.named_parameters())
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) and mine[name].requires_grad for name in mine)
    assert torch.equal(logits(model), logits(dense))
    assert model.get_memory_footprint() == dense.get_memory_footprint()
    assert not model.is_quantized and not hasattr(model, "hf_quantizer") and not list(packed_weights(model))
    model.save_pretrained(tmp_path / "saved")
    dense.save_pretrained(tmp_path / "dense")
    assert_same_tensors(tmp_path / "saved", tmp_path / "dense")
    assert (tmp_path / "saved" / "config.json").read_text() == (tmp_path / "dense" / "config.json").read_text()


def test_dequantized_it_may_have_another_dtype(folders: Folders) -> None:
    pruned, packed = folders("gpt2")
    model = packed_model(packed, "cpu-bitmask").dequantize(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), logits(dense_model(pruned, dtype=torch.float32)))


def test_what_a_backend_holds_is_counted_once(folders: Folders) -> None:
    model = packed_model(folders("mixtral")[1], "dense")
    stack = next(iter(model.model.layers[0].mlp.experts.stacks.values()))
    (matrix,) = stack.matrices
    assert (
        held_bytes(stack) == held_bytes(matrix) == matrix.prepared.weight.nbytes + matrix.prepared.emptied.mask.nbytes
    )
