"""Layers that a packed model keeps dense run by the C kernel for few tokens, where they lie, and are what they were else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import windows
from sparse import assert_same_tensors, save_sparse
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.backends.cpu import dense
from llmsparse.inference import dense_linear
from llmsparse.inference.dense_linear import DenseLinear

pytestmark = [
    pytest.mark.skipif(
        dense.why_not() is not None or not dense.kernel_rows(torch.bfloat16, 1), reason="no kernel here"
    ),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_linear, "LEAST", 1)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose head is tied to its embedding."""
    root = tmp_path_factory.mktemp("tied")
    llmsparse.pack(str(save_sparse("llama", root / "pruned", tie_word_embeddings=True)), root / "packed")
    return root / "packed"


def load(folder: Path, backend: str = "auto", **options: Any) -> Any:
    config = llmsparse.SparseConfig(backend=backend)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def test_a_tied_head_runs_from_the_embeddings_own_memory(packed: Path) -> None:
    model = load(packed)
    assert type(model.lm_head) is DenseLinear
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    x = torch.randn(1, 2, model.lm_head.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model.lm_head(x), dense.matvec(model.lm_head.weight, x))
        many = x.repeat(1, 100, 1)
        assert torch.equal(model.lm_head(many), functional.linear(many, model.lm_head.weight))


def test_it_is_said_what_runs_the_head(packed: Path) -> None:
    explained = llmsparse.explain(load(packed))
    (layer,) = [one for one in explained.layers if one.runs == "cpu-dense"]
    assert (layer.layer, layer.runs) == ("lm_head", "cpu-dense")
    assert any(
        line.startswith("1 layer run by cpu-dense up to") and "lm_head" in line for line in str(explained).splitlines()
    )
    assert "lm_head" in [one["layer"] for one in explained.to_json()["layers"]]


@pytest.mark.parametrize("backend", ["dense", "dense-lowmem"])
def test_backends_that_give_the_bits_of_the_dense_model_leave_its_head_alone(backend: str, packed: Path) -> None:
    model = load(packed, backend)
    assert type(model.lm_head) is nn.Linear and llmsparse.explain(model).layers == []


def test_a_gradient_an_autocast_and_a_graph_are_left_to_torch(packed: Path) -> None:
    head = load(packed, dtype=torch.float32).lm_head
    assert type(head) is DenseLinear
    x = torch.randn(1, head.in_features, requires_grad=True)
    head(x).sum().backward()
    torch.testing.assert_close(x.grad, head.weight.sum(0)[None])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(x).dtype == torch.bfloat16
    with torch.no_grad():
        compiled: Any = torch.compile(head, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), functional.linear(x, head.weight))


def test_it_moves_saves_copies_and_becomes_what_it_was(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    (ids,) = windows((1, 4))
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, wanted)
        assert copy.deepcopy(model).to(torch.float16)(ids).logits.dtype == torch.float16  # no kernel has it
    model.save_pretrained(tmp_path)
    assert_same_tensors(tmp_path, packed)
    assert type(model.dequantize().lm_head) is nn.Linear
