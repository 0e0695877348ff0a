"""Packed products are part of the graphs that torch.compile makes, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.backends import cpu
from llmsparse.formats.bitmask import Bitmask
from llmsparse.inference.graphed import packed_linear
from llmsparse.inference.linear import SparseLinear, fill

pytestmark = [
    pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not())),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]
Folders = Callable[..., tuple[Path, Path]]
BACKENDS = ["cpu-bitmask", "cpu-dense"]


def layer(backend: str = "cpu-bitmask") -> SparseLinear:
    weight = torch.randn(24, 40) * (torch.rand(24, 40) > 0.7)
    packed = Bitmask.pack(weight)
    module = SparseLinear(packed.describe(), nn.Parameter(torch.randn(24)), weight.dtype)
    fill(module, "weight", packed)
    module.prepare("up.weight", packed.describe(), backend)
    return module


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_compiles_into_one_graph_and_says_the_same(backend: str, folders: Folders) -> None:
    config = llmsparse.SparseConfig(backend=backend)
    model: Any = AutoModelForCausalLM.from_pretrained(folders("llama")[1], quantization_config=config)
    assert model.hf_quantizer.is_compileable
    (ids,) = windows((1, 3))
    with torch.no_grad():
        found: Any = torch._dynamo.explain(model)(ids, use_cache=False)
        assert (found.graph_count, found.graph_break_count) == (1, 0)
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_the_default_compiler_takes_it_whole() -> None:
    module, x = nn.Sequential(layer(), nn.SiLU()), torch.randn(3, 40)
    compiled: Any = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_through_a_graph_as_they_do_without(backend: str, tokens: int) -> None:
    module, x = layer(backend), torch.randn(tokens, 40)
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert module.bias is not None
    grads = list[Tensor]()
    for run in (module, compiled):
        leaf = x.clone().requires_grad_()
        module.bias.grad = None
        run(leaf).square().sum().backward()
        assert leaf.grad is not None and module.bias.grad is not None
        grads += [leaf.grad, module.bias.grad]
    torch.testing.assert_close(grads[:2], grads[2:])


def test_the_op_is_what_torch_expects_of_ops() -> None:
    module = layer()
    assert module.matrix is not None
    x = torch.randn(2, 3, 40, requires_grad=True)
    torch.library.opcheck(packed_linear, (x, module.bias, module.matrix.handle, 24))
    torch.library.opcheck(packed_linear, (x.detach(), None, module.matrix.handle, 24))


def test_a_weight_that_is_replaced_is_not_the_one_that_was_compiled() -> None:
    module = layer()
    compiled: Any = torch.compile(module, backend="eager", fullgraph=True)
    x = torch.randn(1, 40)
    with torch.no_grad():
        compiled(x)
        module.matrix = layer().matrix
        assert torch.equal(compiled(x), module(x))
        assert compiled(x.bfloat16().float()).dtype == torch.float32


def test_autocast_in_a_graph_casts_as_it_does_without() -> None:
    module, x = layer(), torch.randn(1, 40)
    compiled: Any = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, wanted = compiled(x), module(x)
    assert y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)
