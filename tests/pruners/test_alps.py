"""ALPS: close to the best support, and the best weights on it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch

from llmsparse.errors import NumericalError, RecipeError
from llmsparse.pruners import ALPS, SparseGPT
from llmsparse.pruners.alps import SHARED_WIDTH
from llmsparse.sparsity.patterns import NofM, Unstructured
from llmsparse.sparsity.stats import Gram

Layer = tuple[torch.Tensor, Gram]


def damped(stat: Gram) -> np.ndarray:
    h = stat.xtx.double().numpy()
    return h + 0.01 * h.diagonal().mean() * np.eye(len(h))


def best_on(h: np.ndarray, w: np.ndarray, support: np.ndarray) -> tuple[np.ndarray, float]:
    """The least-squares row on a support, and its error."""
    row = np.zeros_like(w)
    row[support] = np.linalg.solve(h[np.ix_(support, support)], h[support] @ w)
    return row, float((w - row) @ h @ (w - row))


def test_weights_are_the_least_squares_solution_on_the_mask(
    correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(12, 64)
    result, h = ALPS()(weight, stat, Unstructured(0.6, "row"), generator), damped(stat)
    for dense, pruned, keep in zip(weight.double().numpy(), result.weight.numpy(), result.keep.numpy(), strict=True):
        exact, _ = best_on(h, dense, np.flatnonzero(keep))
        np.testing.assert_allclose(pruned, exact, atol=1e-3 * np.abs(exact).max())


def test_is_within_a_few_percent_of_the_best_of_all_masks(
    correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(40, 10, tokens=200)
    result, h = ALPS()(weight, stat, Unstructured(0.5, "row"), generator), damped(stat)
    reached = best = 0.0
    for dense, keep in zip(weight.double().numpy(), result.keep.numpy(), strict=True):
        reached += best_on(h, dense, np.flatnonzero(keep))[1]
        best += min(best_on(h, dense, np.array(support))[1] for support in combinations(range(10), 5))
    assert reached < 1.1 * best


def test_rows_and_whole_matrix_leave_about_the_same_error(
    correlated: Callable[..., Layer], layer_error: Callable[..., float], generator: torch.Generator
) -> None:
    weight, stat = correlated(64, 128)
    row, matrix = (
        layer_error(weight, ALPS()(weight, stat, Unstructured(0.7, scope), generator).weight, stat)
        for scope in ("row", "matrix")
    )
    assert row < 1.1 * matrix


def test_conjugate_gradients_lower_the_error_that_admm_leaves(
    correlated: Callable[..., Layer], layer_error: Callable[..., float], generator: torch.Generator
) -> None:
    weight, stat = correlated(32, 64)
    early, solved = (
        layer_error(
            weight, ALPS(max_iterations=3, solve_iterations=n)(weight, stat, NofM(2, 4), generator).weight, stat
        )
        for n in (0, 50)
    )
    assert solved < early


def test_inverses_are_shared_by_weights_of_one_input(
    correlated: Callable[..., Layer], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, stat = correlated(16, 64)
    made, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: made.append(1) or cholesky(*a, **k))
    ALPS()(weight, stat, NofM(2, 4), generator)
    once = len(made)
    ALPS()(weight, stat, NofM(2, 4), generator)
    assert len(made) == once < 30
    assert SHARED_WIDTH >= 64


def test_a_support_that_cannot_move_ends_the_search(
    correlated: Callable[..., Layer], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, stat = correlated(16, 64)
    made, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: made.append(1) or cholesky(*a, **k))
    result = ALPS()(weight, stat, Unstructured(0.0, "row"), generator)
    torch.testing.assert_close(result.weight, weight, atol=1e-4, rtol=0)
    assert len(made) < 10


def test_sharing_changes_nothing(
    correlated: Callable[..., Layer], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, stat = correlated(16, 64)
    shared = ALPS()(weight, stat, NofM(2, 4), generator)
    monkeypatch.setattr("llmsparse.pruners.alps.SHARED_WIDTH", 0)
    assert torch.equal(ALPS()(weight, stat, NofM(2, 4), generator).weight, shared.weight)


def test_fewer_tokens_than_inputs_is_no_problem(generator: torch.Generator) -> None:
    weight, stat = torch.randn(8, 64, generator=generator), Gram(64, torch.device("cpu"))
    x = torch.randn(5, 64, generator=generator)
    stat.update(x)
    result = ALPS()(weight, stat, Unstructured(0.5, "row"), generator)
    gap, greedy = (
        ((weight - p.weight) @ x.T).norm() for p in (result, SparseGPT()(weight, stat, NofM(2, 4), generator))
    )
    assert gap < greedy


def test_a_hessian_that_is_none_is_an_error(generator: torch.Generator) -> None:
    weight, stat = torch.randn(4, 8, generator=generator), Gram(8, torch.device("cpu"))
    stat.update(torch.randn(50, 8, generator=generator))
    stat.xtx.fill_(-50.0).fill_diagonal_(50.0)
    with pytest.raises(NumericalError, match="not positive definite after 50 tokens"):
        ALPS()(weight, stat, Unstructured(0.5, "row"), generator)


@pytest.mark.parametrize("options", [{"damp": 0.0}, {"rho": 0.0}, {"max_iterations": 0}, {"solve_iterations": -1}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        ALPS(**options)  # pyright: ignore[reportArgumentType]


def test_notes_say_how_far_both_loops_came(correlated: Callable[..., Layer], generator: torch.Generator) -> None:
    weight, stat = correlated(12, 64)
    whole = ALPS()(weight, stat, Unstructured(0.6, "row"), generator)
    assert whole.notes["settled"] is True and 3 <= int(whole.notes["iterations"]) < 300
    assert float(whole.notes["residual"]) <= 1e-5
    short = ALPS(max_iterations=3, solve_iterations=1)(weight, stat, Unstructured(0.6, "row"), generator)
    assert short.notes["settled"] is False and short.notes["iterations"] == 3
    h = damped(stat)
    residual = [
        np.linalg.norm((row @ h - dense @ h)[keep]) / np.linalg.norm(dense @ h)
        for dense, row, keep in zip(weight.double().numpy(), short.weight.numpy(), short.keep.numpy(), strict=True)
    ]
    assert float(short.notes["residual"]) > 1e-5 and max(residual) > 1e-4
