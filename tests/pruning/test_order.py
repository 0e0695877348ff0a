"""The search for an order: exact sums, never worse, and better than the orders that come to mind."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from llmsparse.pruning.permutation.order import Groups, better_order, dealt_out, meetings, retained
from llmsparse.sparsity.patterns import NofM


def random_score(rows: int, width: int, seed: int = 0) -> Tensor:
    """Some columns are much louder than others."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, width, generator=generator) * torch.randn(width, generator=generator).mul(0.7).exp()
    ).square()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (5, 6)])
def test_what_is_kept_is_what_the_mask_keeps(n: int, m: int) -> None:
    score = random_score(16, 48)
    mask = NofM(n, m).keep(score, slice(0, 48), 48)
    assert retained(score, n, m) == pytest.approx((score * mask).sum(dtype=torch.float64).item(), rel=1e-6)
    found = better_order(score, n, m)
    assert sorted(found.channels.tolist()) == list(range(48))
    assert found.before == pytest.approx(retained(score, n, m) / score.sum().item(), rel=1e-6)
    assert found.after == pytest.approx(retained(score[:, found.channels], n, m) / score.sum().item(), rel=1e-6)


def test_on_a_case_solved_by_hand_the_best_order_is_found() -> None:
    """Two loud columns of four stand in one group of 1:2: apart, both are kept."""
    found = better_order(torch.tensor([[9.0, 8.0, 1.0, 2.0], [9.0, 8.0, 2.0, 1.0]]), 1, 2)
    assert (found.before, found.after) == (22 / 40, 34 / 40)
    groups = [set(found.channels[:2].tolist()), set(found.channels[2:].tolist())]
    assert {0, 1} not in groups


def test_on_eight_channels_it_is_the_best_of_all_35_partitions() -> None:
    for seed in range(5):
        score = random_score(6, 8, seed)
        partitions = [[0, *some, *(c for c in range(1, 8) if c not in some)] for some in combinations(range(1, 8), 3)]
        best = max(retained(score[:, order], 2, 4) for order in partitions)
        found = better_order(score, 2, 4)
        assert found.after * score.sum().item() >= 0.99 * best


def test_it_keeps_more_than_random_sorted_and_dealt_orders() -> None:
    score = random_score(64, 172)
    found, total = better_order(score, 2, 4), score.sum().item()
    random = torch.randperm(172, generator=torch.Generator().manual_seed(0))
    loudness = score.sum(0)
    for order in (random, loudness.argsort(), dealt_out(loudness, 4)):
        assert found.after > retained(score[:, order], 2, 4) / total + 0.005


def test_it_is_the_same_every_time_and_never_worse_than_what_was() -> None:
    for seed in range(3):
        score = random_score(8, 32, seed)
        one, two = better_order(score, 2, 4), better_order(score, 2, 4)
        assert torch.equal(one.channels, two.channels)
        assert one.after >= one.before
        again = better_order(score[:, one.channels], 2, 4)
        assert again.after >= one.after


def test_every_row_counts_though_the_search_looks_at_some() -> None:
    """It sees every other row, of which (0, 2), (1, 3) keeps more than (0, 1), (2, 3); the others outweigh them."""
    looked_at = torch.tensor([[9.0, 8.0, 1.0, 2.0]])
    overlooked = torch.tensor([[30.0, 1.0, 30.0, 1.0], [30.0, 1.0, 1.0, 30.0]])
    score = torch.stack([looked_at.expand(512, 4), overlooked.repeat(256, 1)], 1).reshape(1024, 4)
    assert better_order(score[::2], 1, 2).after > better_order(score[::2], 1, 2).before
    assert better_order(score, 1, 2).channels.tolist() == [0, 1, 2, 3]


def test_the_loudest_are_dealt_out_there_and_back() -> None:
    assert dealt_out(torch.arange(8.0), 4).tolist() == [7, 4, 3, 0, 6, 5, 2, 1]


def test_without_work_or_without_a_score_the_order_stays() -> None:
    assert better_order(torch.zeros(4, 16), 2, 4).channels.tolist() == list(range(16))
    one_group = better_order(random_score(4, 4), 2, 4)
    assert one_group.channels.tolist() == [0, 1, 2, 3] and one_group.after == one_group.before
    bounded = better_order(random_score(16, 64), 2, 4, work=0)
    assert bounded.after >= bounded.before


def test_what_a_group_keeps_of_the_rest_follows_from_what_it_must_beat() -> None:
    score = random_score(5, 12).T.reshape(3, 4, 5).contiguous()
    groups = Groups(score, 2)
    for group in range(3):
        for away in range(4):
            newcomer = torch.rand(5)
            other = score[group].clone()
            other[away] = newcomer
            kept = groups.rest[group, away] + torch.maximum(newcomer, groups.threshold[group, away]).sum()
            assert kept.item() == pytest.approx(other.topk(2, dim=0).values.sum().item(), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_two_groups_meet_once(count: int) -> None:
    met = [
        frozenset(pair)
        for one, other in meetings(count, torch.device("cpu"))
        for pair in zip(one.tolist(), other.tolist(), strict=True)
    ]
    assert sorted(met, key=sorted) == sorted(map(frozenset, combinations(range(count), 2)), key=sorted)
