"""What is drawn for a weight depends on its name and on the seed."""

from __future__ import annotations

import pytest
import torch

from llmsparse.runs.seeding import generator_for


def draw(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def test_both_the_name_and_the_seed_decide_what_is_drawn() -> None:
    drawn = {draw(generator_for(name, seed)) for name in ("q", "k") for seed in (0, 1, 2, 2**32)}
    assert len(drawn) == 6, "seeds of more than 32 bits are folded: 2**32 is 1"
    assert draw(generator_for("q", 1)) == draw(generator_for("q", 1))


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1])
def test_a_large_seed_is_taken_too(seed: int) -> None:
    draw(generator_for("w", seed))
