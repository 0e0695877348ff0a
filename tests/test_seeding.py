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


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1])
def test_a_large_seed_is_taken_too(seed: int) -> None:
    draw(generator_for("w", seed))
