from __future__ import annotations

import pytest
import torch

from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.refit import SCALES, fit_scales, refit, routed_hidden, scaled
from llmsparse.factorization.router import Router
from llmsparse.factorization.split import Split

WIDTH, NEURONS, ROUTED = 12, 24, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


FFN_ = FFN(torch.randn(NEURONS, WIDTH, generator=generator(1)), torch.randn(NEURONS, WIDTH, generator=generator(2)),
           torch.randn(WIDTH, NEURONS, generator=generator(3)))  # fmt: skip
SPLIT = Split(torch.arange(8), tuple(torch.arange(8, 24).split(4)))
ROUTER = Router(1e-3 * torch.randn(ROUTED, WIDTH, generator=generator(4)), torch.zeros(ROUTED), "sigmoid", 2)
X = torch.randn(400, WIDTH, generator=generator(5))


def error(ffn: FFN, x: torch.Tensor = X) -> float:
    return float((FFN_(x) - routed_hidden(ffn, SPLIT, ROUTER, x) @ ffn.down.T).square().sum())


def test_hidden_is_gated_by_the_owner_of_each_neuron() -> None:
    gates, hidden = ROUTER.gates(X), routed_hidden(FFN_, SPLIT, ROUTER, X)
    torch.testing.assert_close(hidden[:, :8], FFN_.hidden(X)[:, :8])
    torch.testing.assert_close(hidden[:, 12:16], FFN_.hidden(X)[:, 12:16] * gates[:, 1:2])


def test_refit_is_the_ridge_solution_of_numpy() -> None:
    import numpy as np

    damp = 0.05
    fitted, notes = refit(FFN_, FFN_, SPLIT, ROUTER, [X[:150], X[150:]], damp)
    hidden, target = routed_hidden(FFN_, SPLIT, ROUTER, X).double().numpy(), FFN_(X).double().numpy()
    penalty = np.sqrt(damp * (hidden**2).sum(0).mean())
    left = np.vstack([hidden, penalty * np.eye(NEURONS)])
    right = np.vstack([target, penalty * FFN_.down.T.double().numpy()])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(fitted.down.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert notes == {}


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
    gate[20:] = 0  # expert 3 is silent
    silent = FFN(gate, FFN_.up, FFN_.down)
    fitted, _ = refit(silent, silent, SPLIT, ROUTER, [X])
    torch.testing.assert_close(fitted.down[:, 20:], FFN_.down[:, 20:])


def test_text_that_says_nothing_leaves_the_experts_and_a_note() -> None:
    fitted, notes = refit(FFN_, FFN_, SPLIT, ROUTER, [torch.zeros(9, WIDTH)])
    assert fitted is FFN_ and "no neuron" in notes["refit"]


@pytest.mark.parametrize("pieces", [1, 7])
def test_equations_are_the_same_however_the_tokens_come(pieces: int) -> None:
    whole, _ = refit(FFN_, FFN_, SPLIT, ROUTER, [X])
    torch.testing.assert_close(refit(FFN_, FFN_, SPLIT, ROUTER, list(X.chunk(pieces)))[0].down, whole.down)
