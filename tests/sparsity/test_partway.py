"""Patterns on the way from dense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmsparse.sparsity.partway import partway
from llmsparse.sparsity.patterns import KeepingZeros, NofM, Pattern, Unstructured

PATTERNS = [Unstructured(0.7, "matrix"), Unstructured(0.6, "row"), NofM(2, 4), NofM(1, 8), NofM(4, 8)]


def mask(pattern: Pattern, score: torch.Tensor) -> torch.Tensor:
    return pattern.keep(score, slice(0, score.shape[1]), score.shape[1])


def test_n_of_m_goes_by_whole_steps() -> None:
    assert [str(partway(NofM(2, 4), share)) for share in (0.0, 0.3, 0.5, 0.9, 1.0)] == [
        "unstructured",
        "3:4",
        "3:4",
        "2:4",
        "2:4",
    ]
    assert partway(NofM(2, 4), 0.0).sparsity == 0


@given(
    pattern=st.sampled_from(PATTERNS), shares=st.lists(st.floats(0, 1), min_size=2, max_size=2), seed=st.integers(0, 9)
)
def test_zeros_stay_zeros_on_the_way_and_the_end_is_the_pattern(
    pattern: Pattern, shares: list[float], seed: int
) -> None:
    score = torch.rand(6, 16, generator=torch.Generator().manual_seed(seed))
    early, late = (mask(partway(pattern, share), score) for share in sorted(shares))
    assert not (late & ~early).any()
    assert torch.equal(mask(partway(pattern, 1.0), score), mask(pattern, score))
    assert mask(partway(pattern, 0.0), score).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_zero_already_goes_first_and_stays_away(pattern: Pattern) -> None:
    score = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    zeros = score > 0.9
    for share in (0.0, 0.5, 1.0):
        assert not mask(partway(KeepingZeros(pattern, zeros), share), score)[zeros].any()
