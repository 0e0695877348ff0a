"""The decode loop says what transformers' generate says, token by token, and leaves to it what it does not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import random_model, tiny_config, windows
from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.inference.decode import decode, why_not

FAMILIES = ["llama", "gpt2", "gemma2", "mixtral", "deepseek_v3", "phi", "qwen2"]


def model_of(family: str, dtype: torch.dtype = torch.bfloat16, **generation: Any) -> Any:
    model: Any = random_model(tiny_config(family))
    model = model.to(dtype).eval()
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    return model


def said_by_transformers(model: Any, ids: Tensor, new: int) -> list[int]:
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    if why_not(model) is not None:
        pytest.skip(f"left to transformers: {why_not(model)}")
    for length in (1, 5, 11):
        (ids,) = windows((1, length))
        assert list(decode(model, ids, 20)) == said_by_transformers(model, ids, 20)


@pytest.mark.parametrize(
    "generation",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [5, 6, 7, 8]},
        {"min_new_tokens": 3},
        {"do_sample": True, "temperature": 0.3, "top_k": 5},
        {"eos_token_id": list(range(0, 97, 3))},
    ],
    ids=lambda generation: next(iter(generation)),
)
def test_what_generation_config_says_of_choosing_counts(generation: dict[str, Any]) -> None:
    model = model_of("llama", **generation)
    assert why_not(model) is None
    for length in (2, 7):
        (ids,) = windows((1, length))
        assert list(decode(model, ids, 12)) == said_by_transformers(model, ids, 12)


def test_an_answer_ends_with_a_token_that_ends_it() -> None:
    model, (ids,) = model_of("llama"), windows((1, 4))
    model.generation_config.eos_token_id = None
    first, second, *_ = decode(model, ids, 5)
    model.generation_config.eos_token_id = second
    assert list(decode(model, ids, 5)) == ([first, second] if first != second else [first])


def test_no_gradient_is_kept() -> None:
    model, (ids,) = model_of("llama", torch.float32), windows((1, 4))
    steps = decode(model, ids, 3)
    next(steps)
    assert torch.is_grad_enabled()
    assert len(list(steps)) == 2


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model, (ids,) = model_of("llama", torch.float32), windows((1, 4))
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(NumericalError, match="logits are NaN"):
        list(decode(model, ids, 2))


@pytest.mark.parametrize(
    ("generation", "reason"), [({"num_beams": 4}, "num_beams=4"), ({"stop_strings": ["x"]}, "stop_strings")]
)
def test_what_it_cannot_do_is_left_to_generate(generation: dict[str, Any], reason: str) -> None:
    said = why_not(model_of("llama", **generation))
    assert said is not None and reason in said


@pytest.mark.parametrize("family", ["mamba", "jamba", "qwen3_next"])
def test_models_that_keep_something_else_are_left_to_generate(family: str) -> None:
    assert why_not(model_of(family)) is not None
