"""A step of many is the step of each, and keys and values are kept as transformers keeps them."""

from __future__ import annotations

import pytest
import torch
from architectures import random_model, tiny_config
from transformers import DynamicCache

from llmsparse.errors import CheckpointError
from llmsparse.inference.cache import GROWTH, bytes_held, new_cache, of_attention
from llmsparse.serving.forward import Forward


def test_a_growing_cache_holds_what_transformers_own_would() -> None:
    config = tiny_config("llama")
    ours, theirs = new_cache(config, most=3 * GROWTH), DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    for step in (5, 1, 1, GROWTH, 1, 2 * GROWTH - 8):
        new = torch.randn(2, 1, 2, step, 8, generator=generator)
        for layer in (0, 1):
            for got, wanted in zip(ours.update(*new, layer), theirs.update(*new, layer), strict=True):
                assert torch.equal(got, wanted)
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert bytes_held(ours) == bytes_held(theirs) == 3 * GROWTH * 2 * 2 * 2 * 8 * 4


def test_it_takes_no_more_room_than_the_conversation_may_have() -> None:
    cache = new_cache(tiny_config("llama"), most=10)
    cache.update(*torch.zeros(2, 1, 2, 6, 8), 0)
    assert cache.layers[0].keys.untyped_storage().nbytes() == 10 * 2 * 8 * 4


def test_what_is_kept_besides_keys_and_values_is_seen() -> None:
    kinds = {name: of_attention(new_cache(tiny_config(name), 8)) for name in ("llama", "gemma2", "jamba", "qwen3_next")}
    assert kinds == {"llama": True, "gemma2": True, "jamba": False, "qwen3_next": False}


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt_oss"])
@torch.inference_mode()
def test_a_step_together_is_each_ones_own(name: str) -> None:
    forward = Forward(random_model(tiny_config(name)))
    prompts = [[3, 4, 5], [9] * 20, [7]]  # one longer than the sliding window of 8
    caches, wanted = [forward.cache(40) for _ in prompts], [forward.cache(40) for _ in prompts]
    for prompt, one, other in zip(prompts, caches, wanted, strict=True):
        forward.read(one, prompt)
        forward.read(other, prompt)
    for step in range(12):
        tokens = [10 + step, 20 + step, 30 + step]
        together = forward.step_together(caches, tokens, [len(prompt) + step for prompt in prompts])
        alone = torch.cat([forward.read(cache, [token]) for cache, token in zip(wanted, tokens, strict=True)])
        assert torch.allclose(together, alone, atol=1e-4)


@torch.inference_mode()
def test_bytes_of_a_token_are_those_that_are_kept() -> None:
    assert Forward(random_model(tiny_config("llama"))).bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert Forward(random_model(tiny_config("llama")).to(torch.bfloat16)).bytes_per_token == 2 * 2 * 2 * 8 * 2


def test_a_model_without_keys_and_values_is_refused_in_a_line() -> None:
    with pytest.raises(CheckpointError, match="MambaForCausalLM takes no past_key_values"):
        Forward(random_model(tiny_config("mamba")))


@torch.inference_mode()
def test_two_in_one_process_do_not_see_each_other() -> None:
    first, second = (Forward(random_model(tiny_config("llama"), seed=seed)) for seed in (0, 1))
    for forward in (first, second, first):
        caches = [forward.cache(8), forward.cache(8)]
        for cache in caches:
            forward.read(cache, [3, 4])
        together = forward.step_together(caches, [5, 6], [2, 2])
        assert torch.allclose(together[0], forward.read(forward.cache(8), [3, 4, 5])[0], atol=1e-4)
