"""Shares of a block's layers: what they add up to, and that the error decides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsparse.cutting.allocation import MOST, Levels, greedy, uniform

SIZES = st.dictionaries(st.sampled_from("qkvogud"), st.integers(1, 10_000), min_size=1)


def total(sizes: dict[str, int], levels: Levels) -> float:
    return sum(sizes[name] * level for name, level in levels.items()) / sum(sizes.values())


@given(SIZES, st.floats(0, 0.99), st.lists(st.floats(0.1, 10), min_size=7, max_size=7))
def test_greedy_reaches_the_total_exactly(sizes: dict[str, int], share: float, costs: list[float]) -> None:
    cost = dict(zip("qkvogud", costs, strict=True))
    levels = greedy(sizes, share, lambda at: sum(cost[name] * level**2 for name, level in at.items()))
    assert total(sizes, levels) == pytest.approx(share, abs=1e-6)
    assert all(0 <= level <= max(MOST, share) + 1e-9 for level in levels.values())


@given(SIZES, st.floats(0, 0.99))
def test_uniform_gives_all_the_same(sizes: dict[str, int], share: float) -> None:
    assert set(uniform(sizes, share).values()) == {share}


def test_greedy_takes_from_where_it_costs_least_for_a_weight() -> None:
    levels = greedy({"cheap": 100, "dear": 100}, 0.5, lambda at: at["cheap"] ** 2 + 9 * at["dear"] ** 2)
    assert levels["cheap"] == pytest.approx(0.9) and levels["dear"] == pytest.approx(
        0.1
    )  # 9 : 1, where slopes are equal


def test_greedy_weighs_an_error_by_the_weights_that_it_spares() -> None:
    levels = greedy({"small": 10, "large": 1000}, 0.1, lambda at: at["small"] + 2 * at["large"])
    assert levels["large"] > 0.09 and levels["small"] == 0.0
