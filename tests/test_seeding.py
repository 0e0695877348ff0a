from __future__ import annotations

import zlib

import pytest
import torch

from llmsparse.seeding import generator_for


def draw(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_small_seed_stands_above_the_hash_of_the_name(seed: int) -> None:
    expected = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(b"w"))
    assert draw(generator_for("w", seed)) == draw(expected)


def test_every_seed_that_a_recipe_takes_gives_other_draws() -> None:
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1]
    assert len({draw(generator_for("w", seed)) for seed in seeds}) == len(seeds)
