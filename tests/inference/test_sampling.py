"""One request's choice of a token, from logits that are worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import random_model, tiny_config

from llmsparse.errors import NumericalError
from llmsparse.inference.sampling import Rules, Sampler, Sampling

GREEDY = Sampling()
IDS = torch.tensor([[3, 3, 5]])


def rules(**generation: Any) -> Rules:
    model = random_model(tiny_config("llama"))
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    return Rules(model)


def sampler(asked: Sampling = GREEDY, **generation: Any) -> Sampler:
    return rules(**generation).sampler(asked, prompt_tokens=3, new=10)


def logits(**chosen: float) -> torch.Tensor:
    scores = torch.full((1, 97), -10.0)
    for token, score in chosen.items():
        scores[0, int(token[1:])] = score
    return scores


def drawn(chosen: Sampler, scores: torch.Tensor, times: int = 200) -> set[int]:
    return {chosen.choose(scores, IDS) for _ in range(times)}


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-37, 1e-38, 1e-300, 5e-324])
def test_a_temperature_too_small_to_matter_is_the_first_of_the_largest(temperature: float) -> None:
    assert drawn(sampler(Sampling(temperature=temperature)), logits(_9=2.0, _4=2.0, _70=1.9)) == {4}


@pytest.mark.parametrize("asked", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.0), Sampling()], ids=str)
def test_so_is_a_choice_of_one(asked: Sampling) -> None:
    assert drawn(sampler(asked), logits(_9=2.0, _4=2.0)) == {4}
    assert sampler(asked).plain


def test_a_small_temperature_that_matters_is_a_draw() -> None:
    assert drawn(sampler(Sampling(temperature=1e-5)), logits(_9=2.0, _4=2.0, _70=1.9)) == {4, 9}


def test_each_limit_leaves_what_it_should() -> None:
    scores = logits(_1=3.0, _2=2.0, _3=1.0, _4=0.0)  # chances 0.64, 0.24, 0.09, 0.03
    assert drawn(sampler(Sampling(1.0, top_k=2)), scores) == {1, 2}
    assert drawn(sampler(Sampling(1.0, top_p=0.7)), scores) == {1, 2}
    assert drawn(sampler(Sampling(1.0, min_p=0.3)), scores) == {1, 2}
    assert drawn(sampler(Sampling(1.0)), scores, 2000) == {1, 2, 3, 4}


def test_the_models_own_settings_count_where_it_samples_and_nobody_says_otherwise() -> None:
    scores = logits(_1=3.0, _2=2.0, _3=1.0)
    own: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 2}
    assert drawn(sampler(**own), scores) == {1, 2}
    assert drawn(sampler(Sampling(top_k=0), **own), scores, 1000) == {1, 2, 3}
    assert drawn(sampler(Sampling(temperature=0), **own), scores) == {1}
    idle = own | {"do_sample": False}
    assert drawn(sampler(**idle), scores) == {1}
    assert drawn(sampler(Sampling(temperature=1.0), **idle), scores, 1000) == {1, 2, 3}


def test_a_repetition_penalty_is_the_models_or_the_requests() -> None:
    scores = logits(_3=3.0, _4=2.5)  # 3 is in the text so far
    assert drawn(sampler(), scores) == {3}
    assert drawn(sampler(repetition_penalty=1.5), scores) == {4}
    assert drawn(sampler(Sampling(repetition_penalty=1.5)), scores) == {4}
    assert drawn(sampler(Sampling(repetition_penalty=1.0), repetition_penalty=1.5), scores) == {3}


def test_no_ngram_of_the_models_length_comes_twice() -> None:
    ids = torch.tensor([[7, 8, 7]])
    assert sampler(no_repeat_ngram_size=2).choose(logits(_8=3.0, _9=2.0), ids) == 9


def test_openais_penalties_count_the_answer_alone() -> None:
    ids = torch.tensor([[5, 5, 5, 6, 6, 7]])  # three of a prompt, three of an answer
    scores = logits(_5=1.0, _6=2.0, _7=1.6)
    assert sampler(Sampling(frequency_penalty=0.5)).choose(scores, ids) == 7  # 1.0, 2 - 1, 1.6 - 0.5
    assert sampler(Sampling(presence_penalty=1.2)).choose(scores, ids) == 5  # 1.0, 0.8, 0.4


def test_a_seed_draws_the_same_and_each_choice_its_own() -> None:
    scores = logits(**{f"_{token}": 1.0 for token in range(50)})

    own = rules()

    def series(seed: int | None, choice: int = 0) -> list[int]:
        chosen = own.sampler(Sampling(1.0, seed=seed), 3, 10, choice)
        return [chosen.choose(scores, IDS) for _ in range(20)]

    assert series(42) == series(42) and series(0) == series(0) and series(-1) == series(-1)
    assert len({tuple(series(seed, choice)) for seed in (0, 1, -1, 2**63, 2**64 - 2) for choice in (0, 1)}) == 10
    assert series(None) != series(None)


def test_an_unseeded_draw_leaves_a_seeded_one_alone() -> None:
    scores = logits(**{f"_{token}": 1.0 for token in range(50)})
    seeded, other = sampler(Sampling(1.0, seed=3)), sampler(Sampling(1.0))
    alone = sampler(Sampling(1.0, seed=3))
    for _ in range(20):
        other.choose(scores, IDS)
        assert seeded.choose(scores, IDS) == alone.choose(scores, IDS)


@pytest.mark.parametrize("asked", [Sampling(1.0), Sampling(repetition_penalty=1.1)], ids=str)
def test_logits_that_are_no_numbers_are_an_error_and_no_choice(asked: Sampling) -> None:
    with pytest.raises(NumericalError, match="NaN"):
        sampler(asked).choose(logits(_5=float("nan")), IDS)


def test_what_cannot_be_served_is_named() -> None:
    assert rules().not_served() == []
    assert rules(num_beams=4, guidance_scale=1.5, repetition_penalty=1.2).not_served() == [
        "num_beams=4",
        "guidance_scale=1.5",
    ]
    assert sampler(num_beams=4).plain, "and left out"


def test_end_tokens_are_one_or_several_or_none() -> None:
    assert rules(eos_token_id=5).ends == {5} and rules(eos_token_id=[5, 6]).ends == {5, 6}
    assert rules(eos_token_id=None).ends == frozenset()
