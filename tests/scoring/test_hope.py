"""The least pᵀFp, against every set there is."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from llmsparse.scoring.hope import least_loss


def routed(experts: int, k: int, seed: int, tokens: int = 60) -> Tensor:
    """F of random routing."""
    generator = torch.Generator().manual_seed(seed)
    added = torch.zeros(tokens, experts, dtype=torch.float64)
    for token in range(tokens):
        sent = torch.randperm(experts, generator=generator)[:k]
        added[token, sent] = torch.rand(k, generator=generator, dtype=torch.float64)
    return added.T @ added


def lost(pairs: Tensor, gone: Iterable[int]) -> float:
    """pᵀFp."""
    p = torch.zeros(len(pairs), dtype=torch.float64)
    p[list(gone)] = 1.0
    return float(p @ pairs @ p)


def test_the_loss_of_two_counts_what_they_do_together() -> None:
    pairs = torch.tensor([[1.0, 5.0], [5.0, 4.0]], dtype=torch.float64)
    assert lost(pairs, (0,)) == 1 and lost(pairs, (1,)) == 4 and lost(pairs, (0, 1)) == 15


def test_the_pair_that_goes_is_not_the_two_that_lose_least_alone() -> None:
    pairs = torch.diag(torch.tensor([1.0, 1.0, 1.5, 9.0], dtype=torch.float64))
    pairs[0, 1] = pairs[1, 0] = 0.9  # each of the first two makes up for the other
    assert least_loss(pairs, [(range(4), 2)]) == [0, 2]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_set_is_the_best_of_all_in_nearly_every_case_and_close_in_the_others(k: int) -> None:
    best = close = 0
    for seed in range(40):
        experts, goes = 8 + seed % 4, 1 + seed % 6
        pairs = routed(experts, k, seed)
        found = lost(pairs, least_loss(pairs, [(range(experts), goes)]))
        least = min(lost(pairs, gone) for gone in combinations(range(experts), goes))
        best += found <= least * (1 + 1e-9)
        close += found <= least * 1.02
    assert best >= 39 and close == 40


def test_no_swap_of_two_experts_would_lose_less() -> None:
    pairs = routed(40, 6, 5, tokens=400)
    gone = least_loss(pairs, [(range(40), 20)])
    least = lost(pairs, gone)
    for one in gone:
        for other in set(range(40)) - set(gone):
            assert lost(pairs, set(gone) - {one} | {other}) >= least - 1e-9


def test_every_span_loses_as_many_as_it_was_told() -> None:
    pairs = routed(12, 4, 9)
    gone = least_loss(pairs, [(range(4), 1), (range(4, 8), 3), ([8, 11], 1)])
    assert [sum(expert in span for expert in gone) for span in (range(4), range(4, 8), [8, 11], [9, 10])] == [
        1,
        3,
        1,
        0,
    ]


def test_experts_of_which_nothing_is_known_cost_nothing() -> None:
    assert least_loss(torch.zeros(6, 6, dtype=torch.float64), [(range(6), 2)]) == [0, 1]
    assert least_loss(routed(6, 2, 0), [(range(6), 0)]) == []
