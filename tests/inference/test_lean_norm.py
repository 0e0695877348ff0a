"""Norms run by the kernel where they are what it does, and give torch's bits; others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import random_model, tiny_config, windows
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.backends.cpu import norm
from llmsparse.inference.lean_norm import LeanNorm, quicken_norms, slow_down_norms

Folders = Callable[..., tuple[Path, Path]]
pytestmark = [
    pytest.mark.skipif(norm.why_not() is not None, reason=str(norm.why_not())),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]
LIKE_LLAMA = ["llama", "mistral", "qwen2", "qwen3", "mixtral", "glm4", "deepseek_v3"]
OTHERS = ["gemma2", "gpt2", "phi", "stablelm", "gpt_neox"]


def norms(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LeanNorm)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", [*LIKE_LLAMA, *OTHERS])
def test_a_model_says_what_it_said_before(family: str, dtype: torch.dtype) -> None:
    model: Any = random_model(tiny_config(family))
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape).to(dtype))  # else 1 and 0 would hide what they do
        (ids,) = windows((2, 9))
        before = model(ids).logits
        quicken_norms(model)
        after = model(ids).logits
    assert bool(norms(model)) == (family in LIKE_LLAMA)
    bound = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert (before - after).abs().max() <= bound * before.abs().max()
    slow_down_norms(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before) and not norms(model)


def test_gradients_other_dtypes_and_graphs_are_left_to_torch() -> None:
    model: Any = random_model(tiny_config("llama")).float().eval()
    own = model.model.norm
    x = torch.randn(1, 32)
    with torch.no_grad():
        wanted = own(x)
    quicken_norms(model)
    assert type(own).__name__ == "LeanLlamaRMSNorm"
    leaf = x.clone().requires_grad_()
    own(leaf).sum().backward()
    assert leaf.grad is not None and own.weight.grad is not None
    with torch.no_grad():
        assert own(x.bfloat16()).dtype == torch.float32  # as transformers' own: the weight is float32
        compiled: Any = torch.compile(own, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), wanted)


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_a_packed_model_has_them_unless_it_must_give_the_dense_models_bits(backend: str, folders: Folders) -> None:
    config = llmsparse.SparseConfig(backend=backend)
    model: Any = AutoModelForCausalLM.from_pretrained(folders("llama")[1], quantization_config=config)
    assert len(norms(model)) == (0 if backend == "dense" else 5)
    said = str(llmsparse.explain(model))
    assert ("5 layers run by cpu-norm (model.layers.0.input_layernorm, …)" in said) == (backend == "auto")
    assert not norms(model.dequantize())
