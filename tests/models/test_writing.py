"""A model writes: what it draws, and the same whether it is held whole or streamed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import random_model, save_random, stream, tiny_config

from llmsparse.errors import NumericalError
from llmsparse.models.writing import Chooser, write_streamed, write_whole
from llmsparse.text.own_text import FREE

PREFIXES = torch.tensor([[1, FREE, FREE], [1, 7, FREE], [1, 9, 4], [1, FREE, FREE], [5, FREE, FREE]])


def chooser(prefixes: torch.Tensor = PREFIXES, seed: int = 0, temperature: float = 1.0) -> Chooser:
    return Chooser(prefixes, temperature, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt2", "opt", "mixtral", "deepseek_v3", "mamba", "jamba", "qwen3_next"]
)
def test_held_whole_and_streamed_a_model_writes_the_same(name: str, tmp_path: Path) -> None:
    model = stream(save_random(tiny_config(name), tmp_path / "model"))
    steps = list[int]()
    whole = write_whole(model, chooser(), 14, lambda: steps.append(1))
    assert torch.equal(write_streamed(model, chooser(), 14, at_once=2), whole)
    assert torch.equal(write_whole(model, chooser(), 14), whole), "twice the same, and nothing of it is left behind"
    assert len(steps) == 13 and whole.dtype == torch.int64 and whole.shape == (5, 14)
    assert torch.equal(whole[:, :3].where(PREFIXES != FREE, PREFIXES), PREFIXES)
    assert not torch.equal(write_whole(model, chooser(seed=1), 14), whole)


def test_tokens_come_as_often_as_the_model_finds_them_likely(tmp_path: Path) -> None:
    config = tiny_config("llama")
    model, dense = stream(save_random(config, tmp_path / "model")), random_model(config)
    ids = write_whole(model, chooser(torch.full((20_000, 1), 3)), 2)
    likely = dense(torch.tensor([[3]])).logits[0, 0].softmax(dim=0)
    counts = ids[:, 1].bincount(minlength=len(likely))
    spread = (20_000 * likely * (1 - likely)).sqrt()
    assert bool(((counts - 20_000 * likely).abs() < 5 * spread + 1).all())


def test_a_low_temperature_takes_the_likeliest_and_a_text_that_ends_begins_anew() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])
    one = chooser(torch.tensor([[0], [0]]), temperature=1e-3)
    ids = one.begin(4)
    one.choose(logits, ids, 1)
    assert ids[:, 1].tolist() == [2, 0]
    ending = replace(one, first=1, end=2)
    ending.choose(logits, ids, 2)
    assert ids[:, 2].tolist() == [1, 0], "the first token follows the last one of a text"


def test_logits_that_are_no_numbers_are_an_error() -> None:
    one = chooser(torch.tensor([[0]]))
    for wrong in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(NumericalError, match="--dtype float32"):
            one.choose(torch.full((1, 3), wrong), one.begin(2), 1)
