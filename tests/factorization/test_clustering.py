from __future__ import annotations

import itertools

import pytest
import torch

from llmsparse.factorization.clustering import assign, balanced_kmeans


def test_hand_worked_assignment_gives_the_last_place_to_whom_it_matters_most() -> None:
    """Both want cluster 0, which has one place: going to 1 costs the first 1, the second 9."""
    cost = torch.tensor([[0.0, 1.0], [0.0, 9.0]])
    assert assign(cost, [1, 1]).tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_close_to_the_best_of_all(seed: int) -> None:
    cost = torch.rand(8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sizes = [3, 3, 2]
    slots = [cluster for cluster, size in enumerate(sizes) for _ in range(size)]
    best = min(float(cost[torch.arange(8), list(order)].sum()) for order in set(itertools.permutations(slots)))
    labels = assign(cost, sizes)
    assert torch.bincount(labels).tolist() == sizes
    assert float(cost[torch.arange(8), labels].sum()) <= 1.05 * best


@pytest.mark.parametrize("sizes", [[10, 10, 10], [1, 28, 1], [30]])
def test_clusters_have_exactly_the_sizes_asked_for(sizes: list[int]) -> None:
    points = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    labels = balanced_kmeans(points, sizes, torch.Generator().manual_seed(1))
    assert torch.bincount(labels, minlength=len(sizes)).tolist() == sizes


def test_groups_that_lie_apart_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(40) % 4
    points = 10 * torch.eye(4)[group] + torch.randn(40, 4, generator=generator)
    labels = balanced_kmeans(points, [10] * 4, generator)
    assert all(len(labels[group == number].unique()) == 1 for number in range(4))


def test_points_that_are_all_the_same_fill_the_clusters_too() -> None:
    labels = balanced_kmeans(torch.ones(9, 2), [3, 3, 3], torch.Generator().manual_seed(0))
    assert torch.bincount(labels).tolist() == [3, 3, 3]


def test_sizes_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="9 points cannot fill clusters of 8"):
        balanced_kmeans(torch.ones(9, 2), [4, 4], torch.Generator())


@pytest.mark.slow
def test_an_ffn_of_14336_neurons_is_clustered() -> None:
    """A model of 8B: 16 slots, 4 of them shared, profiles on a quarter of the tokens a run takes. Minutes would show here."""
    points = torch.rand(10752, 1024, generator=torch.Generator().manual_seed(0))
    labels = balanced_kmeans(points, [896] * 12, torch.Generator().manual_seed(0), iterations=3)
    assert torch.bincount(labels).tolist() == [896] * 12
