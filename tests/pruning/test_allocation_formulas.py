"""Each allocation against its paper's equation in numpy, and what all must keep: the exact total, the bounds, the order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from llmsparse.errors import OptionError
from llmsparse.pruners.spec import build_from
from llmsparse.pruning.allocation import ALLOCATIONS, Search
from llmsparse.pruning.allocation.alphapruning import AlphaPruning, tail_exponent
from llmsparse.pruning.allocation.dlp import DLP
from llmsparse.pruning.allocation.erdos_renyi import ErdosRenyi, ErdosRenyiKernel
from llmsparse.pruning.allocation.exact import bounded, bounds_of, in_steps, to_levels
from llmsparse.pruning.allocation.lsa import LSA, half_removed
from llmsparse.pruning.allocation.owl import OWL
from llmsparse.pruning.allocation.protocol import Unit
from llmsparse.sparsity.stats import Gram, InputNorm

UNITS = [Unit("a", ((8, 6), (4, 6))), Unit("b", ((8, 6), (4, 6))), Unit("c", ((8, 6), (4, 6)))]


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) ** 3  # with outliers


def seen(allocation: Any, unit: int) -> list[Any]:
    """What it makes of the two weights of a unit, whose inputs differ."""
    found: list[Any] = []
    for number, (_, width) in enumerate(UNITS[unit].shapes):
        stat = allocation.needs(width, torch.device("cpu")) if allocation.needs else None
        if stat is not None:
            stat.update(inputs(unit, number))
        found.append(allocation.look(weight(unit, number), stat))
    return found


def weight(unit: int, number: int) -> torch.Tensor:
    out, width = UNITS[unit].shapes[number]
    return drawn(out, width, seed=10 * unit + number)


def inputs(unit: int, number: int) -> torch.Tensor:
    return drawn(40, UNITS[unit].shapes[number][1], seed=100 + 10 * unit + number) * (1 + unit)


def wanda_scores(unit: int) -> np.ndarray:
    scores = [
        np.abs(weight(unit, n).numpy()) * np.linalg.norm(inputs(unit, n).numpy().astype(np.float64), axis=0)
        for n in (0, 1)
    ]
    return np.concatenate([score.ravel() for score in scores])


def test_owl_counts_outliers_and_moves_by_twice_its_range() -> None:
    owl = OWL(outlier=3.0, spread=0.08)
    outliers = []
    for unit in range(3):
        scores = wanda_scores(unit)
        outliers.append(100 * np.mean(scores > 3.0 * scores.mean()))
        assert owl.judge(seen(owl, unit)) == pytest.approx(outliers[-1])
    d = np.array(outliers)
    kept = 2 * 0.08 * (d - d.min()) / (d.max() - d.min())
    kept = kept - kept.mean() + (1 - 0.7)  # the released code
    assert owl.sparsities(outliers, UNITS, 0.7) == pytest.approx(1 - kept)


def test_dlp_keeps_more_where_scores_are_small() -> None:
    dlp = DLP(spread=0.15)
    means = [wanda_scores(unit).mean() for unit in range(3)]
    assert [dlp.judge(seen(dlp, unit)) for unit in range(3)] == pytest.approx(means, rel=1e-5)
    importance = 1 - np.array(means) / np.sum(means)
    kept = 2 * 0.15 * (importance - importance.min()) / (importance.max() - importance.min())
    found = dlp.sparsities(means, UNITS, 0.7)
    assert found == pytest.approx(1 - (kept - kept.mean() + 0.3))
    assert found[int(np.argmin(means))] == min(found)


def greedy_half(w: np.ndarray, h: np.ndarray) -> float:
    """Σ_{i,j ∈ R} h_ij w_i w_j, R grown by what makes that sum the smallest, for one row."""
    s, removed = h * np.outer(w, w), list[int]()
    for _ in range(len(w) // 2):
        rest = [j for j in range(len(w)) if j not in removed]
        removed.append(min(rest, key=lambda j: s[np.ix_([*removed, j], [*removed, j])].sum()))
    return s[np.ix_(removed, removed)].sum()


def test_lsa_removes_half_of_each_row_greedily() -> None:
    w, x = drawn(5, 12, seed=1), drawn(60, 12, seed=2)
    h = x.double().T @ x.double() / 60
    expected = sum(greedy_half(row, h.numpy()) for row in w.double().numpy())
    assert half_removed(w, h.float()) == pytest.approx(expected, rel=1e-4)
    lsa = LSA(spread=0.1)
    errors = [lsa.judge(seen(lsa, unit)) for unit in range(3)]
    x0 = inputs(0, 0).double()
    first = sum(greedy_half(row, (x0.T @ x0 / 40).numpy()) for row in weight(0, 0).double().numpy())
    assert lsa.look(weight(0, 0), _gram(inputs(0, 0))) == pytest.approx(first, rel=1e-4)
    kept = 2 * 0.1 * (1 - np.array(errors) / np.sum(errors))
    assert lsa.sparsities(errors, UNITS, 0.7) == pytest.approx(0.7 + kept.mean() - kept)


def test_lsa_takes_rows_of_a_tall_weight_for_all() -> None:
    w, x = drawn(4, 8, seed=3), drawn(30, 8, seed=4)
    tall = w.repeat_interleave(300, dim=0)
    assert LSA().look(tall, _gram(x)) == pytest.approx(300 * LSA().look(w, _gram(x)), rel=0.05)


def _gram(x: torch.Tensor) -> Gram:
    gram = Gram(x.shape[1], torch.device("cpu"))
    gram.update(x)
    return gram


def test_a_tail_that_falls_as_a_power_has_that_exponent() -> None:
    # eigenvalues drawn from p(λ) ∝ λ^−α above 1 by the inverse of its distribution, λ = (1 − u)^(−1 / (α − 1))
    for alpha in (2.0, 3.0, 4.5):
        u = (np.arange(600) + 0.5) / 600
        eigenvalues = (1 - u) ** (-1 / (alpha - 1))
        orthogonal = torch.linalg.qr(
            torch.randn(600, 600, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        )[0]
        matrix = orthogonal * torch.from_numpy(np.sqrt(eigenvalues))
        assert tail_exponent(matrix.float()) == pytest.approx(alpha, rel=0.05)


def test_alphapruning_prunes_in_proportion_to_the_exponent() -> None:
    alphas = [2.0, 3.0, 4.0]
    found = AlphaPruning(spread=0.2).sparsities(alphas, UNITS, 0.7)
    assert found == pytest.approx([0.7 * 0.8, 0.7, 0.7 * 1.2])
    mean = AlphaPruning().judge(seen(AlphaPruning(), 0))
    assert mean == pytest.approx((tail_exponent(weight(0, 0)) + tail_exponent(weight(0, 1))) / 2)


@pytest.mark.parametrize(("kind", "sides"), [(ErdosRenyi, 0), (ErdosRenyiKernel, 2)])
def test_erdos_renyi_densities_are_in_proportion_to_sides_over_area(kind: Any, sides: int) -> None:
    units = [Unit("a", ((100, 50),)), Unit("b", ((400, 300),)), Unit("c", ((64, 1000),))]
    density = [1 - sparsity for sparsity in kind().sparsities([], units, 0.8)]
    ratio = [(sum(unit.shapes[0]) + sides) / unit.numel for unit in units]
    assert [d / r for d, r in zip(density, ratio, strict=True)] == pytest.approx([density[0] / ratio[0]] * 3)
    assert sum(d * unit.numel for d, unit in zip(density, units, strict=True)) == pytest.approx(
        0.2 * sum(unit.numel for unit in units)
    )


def test_what_erdos_renyi_would_keep_more_than_all_of_is_dense() -> None:
    units = [Unit("small", ((4, 4),)), Unit("large", ((400, 400),))]
    small, large = ErdosRenyi().sparsities([], units, 0.5)
    assert small == 0 and large == pytest.approx(1 - (0.5 * (16 + 160_000) - 16) / 160_000)


numbers = st.lists(st.floats(-2, 3), min_size=1, max_size=12)


@given(numbers, st.floats(0.05, 0.95), st.integers(0, 2**32))
def test_bounded_sparsities_make_the_total_and_keep_the_order(wished: list[float], sparsity: float, seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 1000, len(wished)).tolist()
    low, high = bounds_of(sparsity)
    found = bounded(wished, sizes, sparsity, low, high)
    assert np.dot(found, sizes) == pytest.approx(sparsity * sum(sizes), abs=1e-6 * sum(sizes))
    assert all(low <= value <= high < 1 for value in found)
    order = np.argsort(wished, kind="stable")
    assert np.all(np.diff(np.array(found)[order]) >= -1e-12)


@given(st.lists(st.floats(0, 0.97), min_size=1, max_size=10), st.integers(0, 2**32))
def test_single_zeros_make_the_exact_total_and_empty_no_weight(sparsities: list[float], seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(64, 1000, len(sparsities)).tolist()
    zeros = round(float(np.dot(sparsities, sizes)))
    assume(zeros <= sum(size - 1 for size in sizes))
    counts = in_steps(sparsities, sizes, [1] * len(sizes), zeros)
    assert sum(counts) == zeros
    assert all(0 <= count < size for count, size in zip(counts, sizes, strict=True))
    assert all(abs(c - s * n) <= 1 for c, s, n in zip(counts, sparsities, sizes, strict=True))


@given(st.lists(st.floats(0, 0.9), min_size=2, max_size=10), st.integers(0, 2**32))
def test_whole_rows_make_the_total_to_half_a_step(sparsities: list[float], seed: int) -> None:
    random = np.random.default_rng(seed)
    steps = random.integers(1, 50, len(sparsities)).tolist()
    sizes = [int(step * random.integers(16, 64)) for step in steps]
    zeros = round(float(np.dot(sparsities, sizes)))
    counts = in_steps(sparsities, sizes, steps, zeros)
    assert all(count % step == 0 and count < size for count, step, size in zip(counts, steps, sizes, strict=True))
    assert abs(sum(counts) - zeros) <= max(steps)


@given(st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=10), st.floats(0.05, 0.7), st.integers(0, 2**32))
def test_levels_make_the_total_to_half_the_largest_step(wished: list[float], sparsity: float, seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(10, 100, len(wished)).tolist()
    levels = [0.0, 0.25, 0.5, 0.75]
    found = to_levels(wished, sizes, levels, sparsity)
    assert set(found) <= set(levels)
    assert abs(np.dot(found, sizes) - sparsity * sum(sizes)) <= 0.25 * max(sizes) / 2 + 1e-9
    order = np.argsort(wished, kind="stable")
    if len(set(sizes)) == 1:
        assert np.all(np.diff(np.array(found)[order]) >= 0)


def test_a_search_finds_what_a_loss_prefers_and_beats_random_candidates() -> None:
    units = [Unit(str(n), ((10, 10),)) for n in range(8)]
    target = np.array([0.55, 0.6, 0.65, 0.68, 0.72, 0.75, 0.8, 0.85])

    def losses(candidates: list[list[float]]) -> list[float]:
        for one in candidates:
            assert sum(one) == pytest.approx(0.7 * 8) and min(one) >= 0 and max(one) <= 0.925
        return [float(np.square(np.array(one) - target).sum()) for one in candidates]

    def run(search: Search, seed: int = 0) -> Any:
        return search.run(units, 0.7, bounds_of(0.7), torch.Generator().manual_seed(seed), losses)

    uniform = losses([[0.7] * 8])[0]
    found, random = run(Search(generations=10)), run(Search(generations=10, evolve=False))
    assert found.loss < 0.2 * uniform and found.loss < random.loss < uniform
    assert run(Search(generations=10)) == found and run(Search(generations=10), seed=1) != found
    assert run(Search(generations=1, candidates=1)).loss == uniform, "what all get alike is always among them"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("owls", "unknown allocation 'owls'; did you mean 'owl'?"),
        ({"name": "owl", "lambda": 1}, "allocation owl has no option 'lambda'"),
        ({"name": "er", "spread": 1}, "it has none"),
        ({"name": "search", "generations": 0}, "allocation search: wanted at least 1 generation"),
        ({"name": "dlp", "spread": "wide"}, "wanted a number"),
    ],
)
def test_an_option_that_is_none_is_one_line(spec: Any, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        build_from(ALLOCATIONS, "allocation", spec, ("allocation",))
    assert said in str(caught.value)


def test_no_inputs_seen_leaves_all_as_they_are() -> None:
    empty = InputNorm(6, torch.device("cpu"))
    for name in ("owl", "dlp"):
        allocation = ALLOCATIONS[name]()
        judged = [allocation.judge([allocation.look(weight(0, 0), empty)])] * 3
        assert allocation.sparsities(judged, UNITS, 0.6) == [0.6] * 3
    assert LSA().sparsities([0.0] * 3, UNITS, 0.6) == [0.6] * 3
