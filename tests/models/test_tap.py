"""The Tap shows each weight what the model really multiplies it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, MIXTURE, save_random, stream, tiny_config, windows
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmsparse.models.streamed import Activations, Block, Slot, StreamedModel
from llmsparse.models.tap import Tap, Watched

TOKENS = (6, 32)


class Products(TorchFunctionMode):
    """What the block computed in every product with a parameter, bias left out: slot → (tokens, out) each time."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr(): (name, p) for name, p in module.named_parameters()}
        self.results: dict[Slot, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        bias: Tensor | None = None
        if func is F.linear:
            x, used = args[:2]
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        elif func is torch.addmm:
            bias, x, used = args
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm):
            x, used = args
        else:
            return result
        name, parameter = self.parameters.get(used.untyped_storage().data_ptr(), (None, None))
        if name is not None and parameter is not None:
            product = result if bias is None else result - bias
            if used.dim() == 3:
                for expert in range(len(used)):  # every token to every expert, those of others as zeros
                    self.add((name, expert), product[expert][x[expert].abs().sum(-1) > 0])
            else:
                expert = used.storage_offset() // parameter[0].numel() if parameter.dim() == 3 else None
                self.add((name, expert), product)
        return result

    def add(self, slot: Slot, product: Tensor) -> None:
        self.results.setdefault(slot, []).append(product.reshape(-1, product.shape[-1]).clone())  # written over later


def inputs_of(block: Block, acts: Activations) -> tuple[dict[Slot, Tensor], dict[Slot, Tensor]]:
    """Per slot: what the Tap saw, (tokens, in), and what the block computed with it, (tokens, out)."""
    seen: dict[Slot, list[Tensor]] = {}
    with Products(block.module) as made:
        block.run(acts, Tap(block, lambda slot, x: seen.setdefault(slot, []).append(x.clone())))
    return {slot: torch.cat(xs) for slot, xs in seen.items()}, {
        slot: torch.cat(ys) for slot, ys in made.results.items()
    }


def each_block(model: StreamedModel, acts: Activations, check: Callable[[Block, Activations], None]) -> None:
    for index in range(len(model.block_names)):
        block = model.block(index)
        check(block, acts)
        acts = block.run(acts)
        block.evict()


def check_products(block: Block, acts: Activations) -> None:
    inputs, products = inputs_of(block, acts)
    for weight in block.weights:
        if not weight.prunable:
            continue
        x, product = inputs[weight.slot], products[weight.slot]  # product may be of gate and up in one
        assert x.shape == (len(product), weight.shape[1]) and len(x) > 0, weight.name
        own = x @ block.view(weight).T
        parts = product.split(weight.shape[0], dim=1)
        assert any(torch.allclose(own, part, rtol=1e-4, atol=1e-4) for part in parts), weight.name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_input_times_stored_weight_is_what_the_block_computed(name: str, tmp_path: Any) -> None:
    model = stream(save_random(tiny_config(name), tmp_path, shard="1GB"))
    each_block(model, model.embed(windows(TOKENS)), check_products)


SQUARE = {
    "gpt2": {"n_inner": 32},
    "mixtral": {"intermediate_size": 32},
    "gpt_oss": {"intermediate_size": 32, "hidden_size": 64},
    "llama4_text": {"intermediate_size": 32},
    "granitemoe": {"intermediate_size": 32},
}


@pytest.mark.parametrize("name", SQUARE)
def test_square_matrices_are_not_mistaken_for_their_transposes(name: str, tmp_path: Any) -> None:
    model = stream(save_random(tiny_config(name, **SQUARE[name]), tmp_path, shard="1GB"))
    assert any(weight.shape[0] == weight.shape[1] and weight.prunable for weight in model.weights(1))
    each_block(model, model.embed(windows(TOKENS)), check_products)


@pytest.mark.parametrize("name", [*MIXTURE, "jamba", "qwen3_next"])
def test_every_token_goes_to_as_many_experts_as_the_router_takes(name: str, tmp_path: Any) -> None:
    config = tiny_config(name)
    model = stream(save_random(config, tmp_path, shard="1GB"))
    routed = TOKENS[0] * TOKENS[1] * config.num_experts_per_tok
    layers: list[int] = []

    def check(block: Block, acts: Activations) -> None:
        inputs, _ = inputs_of(block, acts)
        for parameter in {weight.slot[0] for weight in block.weights if weight.kind == "expert"}:
            assert sum(len(x) for slot, x in inputs.items() if slot[0] == parameter) == routed
            layers.append(block.index)

    each_block(model, model.embed(windows(TOKENS)), check)
    assert layers


def test_each_expert_sees_the_tokens_that_the_router_sent_it(tmp_path: Any) -> None:
    model = stream(save_random(tiny_config("mixtral"), tmp_path))
    acts = model.embed(windows(TOKENS))
    block = model.block(0)
    calls: list[tuple[Tensor, Tensor]] = []
    hook = block.module.get_submodule("mlp.experts").register_forward_pre_hook(lambda _, args: calls.append(args[:2]))
    inputs, _ = inputs_of(block, acts)
    hook.remove()
    hidden, chosen = calls[0]  # (tokens, width), (tokens, top_k)
    for expert in range(4):
        own = hidden[(chosen == expert).any(-1)]
        assert torch.equal(inputs["mlp.experts.gate_up_proj", expert].sort(0).values, own.sort(0).values)


def test_weights_with_one_input_see_the_same_tensor(tmp_path: Any) -> None:
    model = stream(save_random(tiny_config("llama"), tmp_path))
    acts, block = model.embed(windows(TOKENS)), model.block(0)
    held: dict[str, Tensor] = {}
    block.run(acts, Tap(block, lambda slot, x: held.update({slot[0]: x})))
    addresses = {name.split(".")[1]: x.data_ptr() for name, x in held.items()}
    assert addresses["q_proj"] == addresses["k_proj"] == addresses["v_proj"]
    assert addresses["gate_proj"] == addresses["up_proj"]
    assert len(set(addresses.values())) == 4


def test_the_tap_leaves_the_result_and_gradients_alone(tmp_path: Any) -> None:
    model = stream(save_random(tiny_config("qwen3_moe"), tmp_path))
    acts, block = model.embed(windows(TOKENS)), model.block(0)
    plain = block.call(acts, 0)
    weight = block.module.get_parameter("mlp.experts.down_proj").requires_grad_()
    with Tap(block, lambda slot, x: None):
        output = block.call(acts, 0)
    assert torch.equal(output, plain)
    output.square().mean().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "linear by name": lambda x, w: F.linear(weight=w, input=x),
    "x @ w.T": lambda x, w: x @ w.T,
    "matmul": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "method": lambda x, w: x.matmul(w.t()),
    "mm": lambda x, w: torch.mm(x, w.t()),
    "addmm": lambda x, w: torch.addmm(torch.zeros(5), x, w.t()),
    "addmm by name": lambda x, w: torch.addmm(torch.zeros(5), mat1=x, mat2=w.t(), beta=0),
    "w @ x.T": lambda x, w: (w @ x.T).T,
    "einsum": lambda x, w: torch.einsum("ti,oi->to", x, w),
    "einsum, weight first": lambda x, w: torch.einsum("oi,ti->to", w, x),
    "einsum, ellipsis": lambda x, w: torch.einsum("...i,oi->...o", x, w),
}


@pytest.mark.parametrize("spelling", PRODUCTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_spelling_of_a_product_is_seen(spelling: str, transposed: bool) -> None:
    x, matrix = torch.randn(7, 5), torch.randn(5, 5)
    parameter = matrix.T.contiguous() if transposed else matrix
    found = seen_by(parameter, lambda: PRODUCTS[spelling](x, parameter.T if transposed else parameter))
    assert [(slot, flag) for slot, _, flag in found] == [(("w", None), transposed)]
    assert torch.equal(found[0][1], x)


EXPERT_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one by one": lambda x, w: torch.stack([F.linear(x[e], w[torch.tensor(e)]) for e in range(3)]),
    "bmm": lambda x, w: torch.bmm(x, w.transpose(1, 2)),
    "matmul": lambda x, w: x @ w.transpose(1, 2),
    "baddbmm": lambda x, w: torch.baddbmm(torch.zeros(3, 1, 5), x, w.transpose(1, 2)),
    "einsum": lambda x, w: torch.einsum("eti,eoi->eto", x, w),
    "einsum, expert last": lambda x, w: torch.einsum("tie,eoi->eto", x.permute(1, 2, 0), w),
}


@pytest.mark.parametrize("spelling", EXPERT_PRODUCTS)
def test_every_spelling_of_products_with_experts_is_seen(spelling: str) -> None:
    x, parameter = torch.randn(3, 7, 5), torch.randn(3, 5, 5)
    found = seen_by(parameter, lambda: EXPERT_PRODUCTS[spelling](x, parameter))
    assert [(slot, flag) for slot, _, flag in found] == [(("w", expert), False) for expert in range(3)]
    for expert, (_, seen, _) in enumerate(found):
        assert torch.equal(seen, x[expert])


def test_a_part_of_a_matrix_or_a_copy_of_it_is_not_reported() -> None:
    x, parameter = torch.randn(7, 6), torch.randn(5, 6)
    assert not seen_by(parameter, lambda: F.linear(x[:, :4], parameter[:, :4]))
    assert not seen_by(parameter, lambda: F.linear(x, parameter.clone()))
    assert not seen_by(parameter, lambda: F.linear(x[:, :3], parameter[:, ::2]))


def test_a_part_of_a_flat_parameter_is_told_from_the_whole() -> None:
    x, parameter = torch.randn(7, 6), torch.randn(10, 6)  # two experts of (5, 6)
    expert = parameter.view(2, 5, 6)[1]
    watched = Watched([("w", parameter)])

    def parts(func: Any, *args: Tensor) -> list[str]:
        return [product.part for product in watched.products(func, args, {})]

    assert parts(F.linear, x, parameter) == parts(torch.matmul, x, parameter.T) == [""]
    assert parts(F.linear, x, expert) == parts(torch.matmul, x, expert.T) == ["rows"]
    assert parts(torch.matmul, torch.randn(7, 5), expert) == ["columns"]


def seen_by(parameter: Tensor, compute: Callable[[], Tensor]) -> list[tuple[Slot, Tensor, bool]]:
    watched = Watched([("w", parameter)])
    found: list[tuple[Slot, Tensor, bool]] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            products = watched.products(func, args, kwargs or {})
            found.extend((p.slot, p.x, p.transposed) for p in products if p.part != "columns")
            return func(*args, **(kwargs or {}))

    with Mode():
        compute()
    return found
