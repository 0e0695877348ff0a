from __future__ import annotations

import pytest
import torch

from llmsparse.calibration.least_squares import solve
from llmsparse.errors import NumericalError
from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.refit import SCALES, fit_scales, refit, routed_hidden, scaled
from llmsparse.factorization.router import Router
from llmsparse.factorization.split import Split

WIDTH, NEURONS, ROUTED = 12, 24, 4
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alike(seed: int) -> torch.Tensor:
    """(neurons, width): variations of 6 rows, so that neurons that run can stand in for those that do not."""
    rows = torch.randn(6, WIDTH, generator=generator(seed)).repeat(NEURONS // 6, 1)
    return rows + 0.3 * torch.randn(NEURONS, WIDTH, generator=generator(seed + 100))


FFN_ = FFN(alike(1), alike(2), torch.randn(WIDTH, NEURONS, generator=generator(3)))
ORDER = torch.randperm(NEURONS, generator=generator(7))
SPLIT = Split(ORDER[:8], tuple(ORDER[8:].split(4)))
ROUTER = Router(1e-3 * torch.randn(ROUTED, WIDTH, generator=generator(4)), torch.zeros(ROUTED), "sigmoid", 2)
X = torch.randn(400, WIDTH, generator=generator(5))


def error(ffn: FFN, x: torch.Tensor = X) -> float:
    return float((FFN_(x) - routed_hidden(ffn, SPLIT, ROUTER, x) @ ffn.down.T).square().sum())


def test_hidden_is_gated_by_the_owner_of_each_neuron() -> None:
    gates, hidden = ROUTER.gates(X), routed_hidden(FFN_, SPLIT, ROUTER, X)
    torch.testing.assert_close(hidden[:, ORDER[:8]], FFN_.hidden(X)[:, ORDER[:8]])
    torch.testing.assert_close(hidden[:, ORDER[12:16]], FFN_.hidden(X)[:, ORDER[12:16]] * gates[:, 1:2])


def test_solution_is_the_ridge_regression_of_numpy() -> None:
    import numpy as np

    damp = 0.05
    hidden, target = routed_hidden(FFN_, SPLIT, ROUTER, X), FFN_(X)
    down = solve(hidden.T @ hidden, hidden.T @ target, FFN_.down, damp)
    assert down is not None
    h, y = hidden.double().numpy(), target.double().numpy()
    penalty = np.sqrt(damp * (h**2).sum(0).mean())
    left = np.vstack([h, penalty * np.eye(NEURONS)])
    right = np.vstack([y, penalty * FFN_.down.T.double().numpy()])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(down.numpy(), expected, **CLOSE)


def test_refit_solves_the_equations_of_all_tokens_but_every_eighth() -> None:
    fitted, notes = refit(FFN_, FFN_, SPLIT, ROUTER, [X[:160], X[160:]])
    seen = X[torch.arange(400) % 8 != 7]
    hidden = routed_hidden(FFN_, SPLIT, ROUTER, seen)
    expected = solve(hidden.T @ hidden, hidden.T @ FFN_(seen), FFN_.down, notes["damp"])
    torch.testing.assert_close(fitted.down, expected, **CLOSE)


def test_short_pieces_are_held_back_and_fitted_like_long_ones() -> None:
    whole, notes = refit(FFN_, FFN_, SPLIT, ROUTER, [X])
    pieces, notes_of_pieces = refit(FFN_, FFN_, SPLIT, ROUTER, X.split(5))
    assert notes_of_pieces == notes and "damp" in notes
    torch.testing.assert_close(pieces.down, whole.down, **CLOSE)


def test_equations_without_a_solution_give_none() -> None:
    assert solve(-torch.eye(3), torch.ones(3, 2), torch.ones(2, 3), 0.1) is None


def test_more_text_is_fitted_more_closely() -> None:
    """Thirty-two tokens say little about 24 neurons, four hundred do: the damping follows, and new tokens agree."""
    new = torch.randn(400, WIDTH, generator=generator(6))
    little, notes = refit(FFN_, FFN_, SPLIT, ROUTER, [X[:32]])
    much, more = refit(FFN_, FFN_, SPLIT, ROUTER, [X])
    assert more["damp"] < notes["damp"]
    assert error(much, new) < error(little, new) < error(FFN_, new)


def test_each_step_brings_the_output_closer() -> None:
    factors = fit_scales(FFN_, SPLIT, ROUTER, [X])
    better = scaled(FFN_, SPLIT, factors)
    assert error(refit(FFN_, better, SPLIT, ROUTER, [X])[0]) < error(better) < error(FFN_)
    new = torch.randn(400, WIDTH, generator=generator(6))
    assert error(refit(FFN_, better, SPLIT, ROUTER, [X])[0], new) < error(FFN_, new)


def test_scales_are_the_least_squares_solution() -> None:
    """No factor can be changed a little to the better, but for what the damping holds back."""
    factors = fit_scales(FFN_, SPLIT, ROUTER, [X])
    best = error(scaled(FFN_, SPLIT, factors))
    for slot in range(ROUTED + 1):
        for change in (0.9, 1.1):
            other = factors.clone()
            other[slot] *= change
            assert error(scaled(FFN_, SPLIT, other)) > best


def test_scaling_by_ratio_and_none_are_what_they_say() -> None:
    assert SCALES["ratio"](FFN_, SPLIT, ROUTER, []).tolist() == [2.0] * 4 + [1.0]
    assert SCALES["none"](FFN_, SPLIT, ROUTER, []).tolist() == [1.0] * 5


def test_a_neuron_that_never_runs_keeps_its_column() -> None:
    gate = FFN_.gate.clone()
    gate[ORDER[20:]] = 0  # expert 3 is silent
    silent = FFN(gate, FFN_.up, FFN_.down)
    fitted, _ = refit(silent, silent, SPLIT, ROUTER, [X])
    torch.testing.assert_close(fitted.down[:, ORDER[20:]], FFN_.down[:, ORDER[20:]])


def test_neurons_that_all_stay_silent_are_left_alone() -> None:
    nothing = FFN(0 * FFN_.gate, FFN_.up, FFN_.down)
    fitted, notes = refit(nothing, nothing, SPLIT, ROUTER, [X])
    assert fitted is nothing and "no neuron" in notes["refit"]


def test_equations_that_no_damping_makes_solvable_are_an_error() -> None:
    with pytest.raises(NumericalError, match=r"not positive definite.*--no-refit"):
        refit(FFN_, FFN_, SPLIT, ROUTER, [X * torch.inf])


@pytest.mark.parametrize("pieces", [2, 5])
def test_equations_are_the_same_however_the_tokens_come(pieces: int) -> None:
    whole, _ = refit(FFN_, FFN_, SPLIT, ROUTER, [X])
    torch.testing.assert_close(
        refit(FFN_, FFN_, SPLIT, ROUTER, list(X.split(400 // pieces)))[0].down, whole.down, **CLOSE
    )
