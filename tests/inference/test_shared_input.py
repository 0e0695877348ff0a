"""Layers of one input are multiplied in one call, and give what each would give alone, whatever is done with them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import windows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.backends import cpu
from llmsparse.formats.bitmask import Bitmask
from llmsparse.inference.linear import SparseLinear, fill
from llmsparse.inference.shared_input import ALONE, PATIENCE, Group

pytestmark = [
    pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not())),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]
Folders = Callable[..., tuple[Path, Path]]


def layer(out: int, seed: int, dtype: torch.dtype = torch.float32) -> SparseLinear:
    """(out, 40), with a bias where `seed` is odd."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, 40, generator=generator) * (torch.rand(out, 40, generator=generator) > 0.7)
    packed = Bitmask.pack(weight.to(dtype))
    bias = nn.Parameter(torch.randn(out, generator=generator).to(dtype), requires_grad=False) if seed % 2 else None
    module = SparseLinear(packed.describe(), bias, dtype)
    fill(module, "weight", packed)
    module.prepare(f"layer{seed}.weight", packed.describe(), "cpu-bitmask")
    return module


def alone(module: SparseLinear, x: Tensor) -> Tensor:
    assert module.matrix is not None
    with torch.no_grad():
        return module.matrix.run(x, module.bias)


def siblings(*outs: int) -> list[SparseLinear]:
    """Layers that have been seen to share an input."""
    layers, x = [layer(out, seed) for seed, out in enumerate(outs)], torch.ones(1, 40)
    with torch.no_grad():
        for one in layers:
            one(x)
        layers[0](torch.ones(1, 40))
    assert len({id(one.group) for one in layers}) == 1 and isinstance(layers[0].group, Group)
    return layers


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each call of the kernel had."""
    seen = list[int]()
    real = cpu.matvecs

    def spy(weights: Any, *rest: Any, **named: Any) -> Any:
        seen.append(len(weights))
        return real(weights, *rest, **named)

    monkeypatch.setattr(cpu, "matvecs", spy)
    return seen


def test_a_model_finds_its_groups_and_says_what_it_said_before(folders: Folders, calls: list[int]) -> None:
    config = llmsparse.SparseConfig(backend="cpu-bitmask")
    model: Any = AutoModelForCausalLM.from_pretrained(folders("llama")[1], quantization_config=config)
    (ids,) = windows((1, 1))
    with torch.no_grad():
        before = model(ids).logits
        assert set(calls) == {1}
        model(ids)
        calls.clear()
        assert torch.equal(model(ids).logits, before)
    blocks = model.config.num_hidden_layers
    assert sorted(calls) == sorted([3, 1, 2, 1] * blocks + [1])  # q k v, o, gate up, down; the head
    attention, ffn = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert attention.q_proj.group is attention.k_proj.group is attention.v_proj.group is not ffn.up_proj.group
    assert not isinstance(attention.o_proj.group, Group)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.integers(0, 2), st.integers(0, 2)),  # a layer, an input
        st.tuples(st.just("write"), st.integers(0, 2), st.integers(0, 9)),  # to an input
        st.tuples(st.just("replace"), st.integers(0, 2), st.integers(0, 9)),  # an input by another
        st.tuples(st.just("change"), st.integers(0, 2), st.integers(0, 9)),  # a layer's weight
        st.tuples(st.just("bias"), st.integers(0, 2), st.integers(0, 9)),
    ),
    max_size=40,
)


@given(STEPS, st.booleans(), st.sampled_from((1, 3, 100)))
def test_whatever_is_called_in_whatever_order_gives_its_own_product(
    steps: list[tuple[str, int, int]], inferring: bool, tokens: int
) -> None:
    layers = siblings(8, 12, 20)
    with torch.inference_mode(inferring), torch.no_grad():
        inputs = [torch.randn(tokens, 40) for _ in range(3)]
        for what, which, value in steps:
            if what == "call":
                assert torch.equal(layers[which](inputs[value]), alone(layers[which], inputs[value]))
            elif what == "write":
                inputs[which][0, value] += 1
            elif what == "replace":
                inputs[which] = torch.randn(1 + value, 40)
            elif what == "change":
                layers[which].matrix = layer(layers[which].out_features, value).matrix
            else:
                layers[which].bias = nn.Parameter(torch.full((layers[which].out_features,), float(value)))


def test_one_call_does_for_all_of_them_only_once(calls: list[int]) -> None:
    layers, x = siblings(8, 12, 20), torch.randn(2, 40)
    calls.clear()
    with torch.no_grad():
        results = [one(x) for one in layers]
        assert calls == [3] and all(y.is_contiguous() for y in results)
        layers[1](x)  # what was picked up is gone
        assert calls == [3, 3]


def test_an_input_that_a_hook_changes_is_seen() -> None:
    layers, x = siblings(8, 12), torch.randn(1, 40)
    layers[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    with torch.no_grad():
        layers[0](x)
        assert torch.equal(layers[1](x), alone(layers[1], x + 1))


def test_gradients_flow_as_without_a_group() -> None:
    layers = siblings(8, 12)
    x = torch.randn(1, 40, requires_grad=True)
    sum(one(x).sum() for one in layers).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, sum(one.weight.sum(0) for one in layers)[None])  # pyright: ignore[reportIndexIssue]
    with torch.no_grad():
        layers[0](x)
    layers[1].bias = nn.Parameter(torch.zeros(12))
    assert layers[1](x.detach()).requires_grad


def test_a_product_of_inference_mode_is_not_handed_out_of_it() -> None:
    layers, x = siblings(8, 12), torch.randn(1, 40)
    with torch.inference_mode():
        layers[0](x)
    with torch.no_grad():
        assert not layers[1](x).is_inference()


def test_a_group_whose_members_no_longer_share_their_input_is_given_up(calls: list[int]) -> None:
    layers = siblings(8, 12)
    with torch.no_grad():
        for _ in range(PATIENCE + 2):
            layers[0](torch.randn(1, 40))
    assert layers[0].group is layers[1].group is ALONE
    calls.clear()
    with torch.no_grad():
        layers[0](torch.randn(1, 40))
    assert calls == [1]


def test_a_copy_finds_its_own_group_and_a_dropped_layer_is_gone_at_once() -> None:
    layers = nn.ModuleList(siblings(8, 12))
    copied: Any = copy.deepcopy(layers)
    x = torch.randn(1, 40)
    with torch.no_grad():
        assert [torch.equal(one(x), other(x)) for one, other in zip(layers, copied, strict=True)] == [True, True]
    assert not isinstance(copied[0].group, Group)
    held = weakref.ref(copied[1].matrix)
    del copied
    assert held() is None
    gone = weakref.ref(layers[1].matrix)
    del layers
    assert gone() is None


def test_layers_of_other_dtypes_stay_by_themselves(calls: list[int]) -> None:
    layers = siblings(8, 12)
    layers[1].to(torch.bfloat16)
    x = torch.randn(1, 40)
    calls.clear()
    with torch.no_grad():
        assert torch.equal(layers[0](x), alone(layers[0], x))
    assert max(calls) == 1
