"""Which experts stay, by every score, and those to whom scores do not apply."""

from __future__ import annotations

import pytest
import torch

from llmsparse.scoring.scores import choose, super_experts
from llmsparse.scoring.statistics import ExpertStatistics


def statistics(
    tokens: list[float], gates: list[float], outputs: list[float], additions: list[float]
) -> ExpertStatistics:
    sums = ExpertStatistics.empty(len(tokens))
    sums.tokens, sums.gates, sums.outputs, sums.additions = (
        torch.tensor(values, dtype=torch.float64) for values in (tokens, gates, outputs, additions)
    )
    sums.pairs = torch.diag(sums.additions**2)
    sums.peak, sums.seen = sums.outputs / sums.tokens.clamp_min(1), sum(tokens)
    return sums


FOUR = statistics([9, 3, 4, 5], [1.0, 2.0, 0.9, 3.0], [9.0, 9.0, 8.0, 4.0], [9.0, 1.5, 8.0, 1.0])


@pytest.mark.parametrize(
    ("score", "kept"),
    [
        ("frequency", [0, 3]),  # 9, 3, 4, 5 tokens
        ("mass", [1, 3]),  # Σ g of 1, 2, 0.9 and 3
        ("man", [1, 2]),  # mean ‖f‖ of 1, 3, 2 and 0.8
        ("reap", [0, 2]),  # mean g‖f‖ of 1, 0.5, 2 and 0.2
        ("hope", [0, 2]),  # no two run together: the largest Σ (g‖f‖)² stay
    ],
)
def test_each_score_keeps_what_its_formula_says(score: str, kept: list[int]) -> None:
    assert choose(FOUR, score, 2).kept == kept


def test_a_random_choice_is_the_seeds_and_no_other() -> None:
    def drawn(seed: int) -> list[int]:
        return choose(FOUR, "random", 2, generator=torch.Generator().manual_seed(seed)).kept

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(20)}) > 3


@pytest.mark.parametrize("score", ["frequency", "mass", "reap", "man", "hope"])
def test_experts_that_no_token_reached_go_first_the_smallest_before_others(score: str) -> None:
    sums = statistics([0, 5, 0, 1, 0], [0, 5.0, 0, 0.1, 0], [0, 5.0, 0, 0.1, 0], [0, 5.0, 0, 0.01, 0])
    sizes = torch.tensor([2.0, 1.0, 1.0, 1.0, 3.0])
    assert choose(sums, score, 2, sizes=sizes).kept == [1, 3]
    assert choose(sums, score, 3, sizes=sizes).kept == [1, 3, 4]
    assert choose(sums, score, 1, sizes=sizes).kept == [1]
    assert choose(sums, score, 2).unreached == [0, 2, 4]


@pytest.mark.parametrize("score", ["frequency", "mass", "reap", "man", "hope"])
def test_an_expert_with_outputs_far_beyond_the_others_stays(score: str) -> None:
    sums = statistics([9, 8, 1, 7], [9.0, 8.0, 0.001, 7.0], [9.0, 8.0, 60.0, 7.0], [9.0, 8.0, 0.001, 7.0])
    sums.outputs[2] = 0.5  # so that no score would keep it, but its largest output
    chosen = choose(sums, score, 2)
    assert super_experts(sums) == [2]
    assert 2 in chosen.kept and chosen.super_experts == [2]


def test_super_experts_go_only_where_nothing_else_is_left() -> None:
    sums = statistics([1.0] * 5, [1.0] * 5, [1.0, 1.0, 1.0, 50.0, 60.0], [1.0] * 5)
    assert choose(sums, "frequency", 1).kept == [4]


@pytest.mark.parametrize("score", ["frequency", "reap", "hope", "random"])
def test_groups_lose_equally_many(score: str) -> None:
    counts = [float(n) for n in range(1, 13)]
    kept = choose(statistics(counts, counts, counts, counts), score, 6, groups=3, generator=torch.Generator()).kept
    assert [sum(expert // 4 == group for expert in kept) for group in range(3)] == [2, 2, 2]


def test_what_is_lost_is_a_share_of_what_experts_add() -> None:
    squares = [9.0**2, 1.5**2, 8.0**2, 1.0**2]
    assert choose(FOUR, "reap", 2).lost == pytest.approx((squares[1] + squares[3]) / sum(squares))
