"""A packed model decodes by the attention kernel, and by torch's attention whatever it is not for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import windows
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.backends.cpu import attention as kernel
from llmsparse.inference import decode_attention
from llmsparse.inference.decode_attention import MARK, attention_modules

Folders = Callable[..., tuple[Path, Path]]
pytestmark = [
    pytest.mark.skipif(not kernel.usable(torch.bfloat16, 64), reason="torch's attention is faster here"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]


@pytest.fixture(autouse=True)
def narrow_heads_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernel, "NARROW", 1)
    kernel.usable.cache_clear()
    yield
    kernel.usable.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Queries and keys of each call of the kernel."""
    seen = list[tuple[int, int]]()

    def spy(q: Any, k: Any, *rest: Any) -> Any:
        seen.append((q.shape[2], k.shape[2]))
        return kernel.attention(q, k, *rest)

    monkeypatch.setattr(decode_attention, "attention", spy)
    return seen


def load(folder: Path, backend: str = "auto", **options: Any) -> Any:
    config = llmsparse.SparseConfig(backend=backend)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "deepseek_v3", "phi", "gemma2"])
def test_what_is_decoded_is_what_torch_would_say(family: str, folders: Folders, calls: list[tuple[int, int]]) -> None:
    model = load(folders(family)[1], dtype=torch.float32)
    (ids,) = windows((2, 6))
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        assert not calls  # a prompt is not decoding
        cache = model(ids[:, :5], use_cache=True).past_key_values
        step = model(ids[:, 5:], past_key_values=cache).logits[:, -1]
    if model.config._attn_implementation == "sdpa":
        assert calls == [(1, 6)] * len(calls) and len(calls) == len(attention_modules(model))
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)


def test_a_padded_batch_continues_as_each_of_its_prompts_does(folders: Folders, calls: list[tuple[int, int]]) -> None:
    model = load(folders("llama")[1], dtype=torch.float32)
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), **options)
    assert calls
    alone = model.generate(ids[:1, 2:], attention_mask=torch.ones(1, 3, dtype=torch.int64), **options)
    assert together[0, 5:].tolist() == alone[0, 3:].tolist()


@pytest.mark.parametrize("backend", ["dense", "dense-lowmem"])
def test_backends_that_give_the_bits_of_the_dense_model_keep_its_attention(
    backend: str, folders: Folders, calls: list[tuple[int, int]]
) -> None:
    pruned, packed = folders("llama")
    model = load(packed, backend)
    dense: Any = AutoModelForCausalLM.from_pretrained(pruned)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    (ids,) = windows((1, 5))
    load(packed)  # that another model is marked changes nothing
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options)) and not calls


def test_gradients_and_autocast_are_left_to_torch(folders: Folders, calls: list[tuple[int, int]]) -> None:
    model = load(folders("llama")[1], dtype=torch.float32)
    embedded = model.get_input_embeddings()(torch.tensor([[3]])).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None and not calls
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.tensor([[3]]))
    assert not calls


def test_a_model_that_was_asked_for_another_attention_keeps_it(folders: Folders, calls: list[tuple[int, int]]) -> None:
    model = load(folders("llama")[1], attn_implementation="eager")
    with torch.no_grad():
        model(torch.tensor([[3]]))
    assert not calls and not any(MARK in vars(module) for module in model.modules())


def test_made_dense_it_runs_as_it_did_before_and_it_is_said_what_runs(
    folders: Folders, calls: list[tuple[int, int]]
) -> None:
    model = load(folders("llama")[1])
    said = str(llmsparse.explain(model))
    assert "2 layers run by cpu-attention up to 8 tokens (model.layers.0.self_attn, …)" in said
    model.dequantize()
    with torch.no_grad():
        model(torch.tensor([[3]]))
    assert not calls and llmsparse.explain(model).layers == []
