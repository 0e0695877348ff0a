"""The closed form against numpy, and what is kept of the inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmsparse.calibration.least_squares import DAMPS, HELD_BACK
from llmsparse.errors import NumericalError
from llmsparse.shrinking.projection import PULL, Seen, energies, fit_columns, least_missed, loudest

CPU = torch.device("cpu")


def correlated(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 3, generator=generator) @ torch.randn(3, width, generator=generator) + 0.3 * torch.randn(
        tokens, width, generator=generator
    )


def seen_of(x: torch.Tensor, pieces: int, fits: bool = True) -> Seen:
    seen = Seen(x.shape[1], pieces, CPU, fits)
    for part in x.split(7):
        seen.update(part)
    return seen


def test_refit_is_the_closed_form() -> None:
    x, weight = correlated(400, 12), torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    columns = torch.tensor([0, 2, 3, 7, 9, 11])
    fitted = fit_columns(weight, columns, seen_of(x, 12))
    assert fitted.damp in DAMPS

    h, w = x.numpy().astype(float), weight.numpy().astype(float)
    judge = np.arange(len(h)) % HELD_BACK == HELD_BACK - 1
    gram = h[~judge].T @ h[~judge]
    kept = columns.numpy()
    damping = fitted.damp * np.diag(gram)[kept].mean()
    left = gram[np.ix_(kept, kept)] + damping * np.eye(len(kept))
    right = gram[kept] @ w.T + damping * w[:, kept].T
    assert fitted.weight.numpy() == pytest.approx(np.linalg.solve(left, right).T, abs=1e-3)

    for matrix, error in ((w[:, kept], fitted.before), (fitted.weight.numpy(), fitted.after)):
        lost = h[judge] @ w.T - h[judge][:, kept] @ matrix.T
        assert error == pytest.approx((lost**2).sum() / ((h[judge] @ w.T) ** 2).sum(), rel=1e-3)


@given(st.sampled_from([1, 2, 3]), st.booleans())
def test_the_energy_of_a_piece_is_what_it_adds_to_the_output(size: int, fits: bool) -> None:
    x, weight = correlated(40, 6 * size), torch.randn(5, 6 * size, generator=torch.Generator().manual_seed(2))
    seen = seen_of(x, 6, fits)
    counted = x[torch.arange(40) % HELD_BACK != HELD_BACK - 1] if fits else x
    for piece, energy in enumerate(energies(weight, seen)):
        part = slice(piece * size, (piece + 1) * size)
        assert energy.item() == pytest.approx((counted[:, part] @ weight[:, part].T).square().sum().item(), rel=1e-4)


def test_pieces_come_in_order_and_ties_go_to_the_first() -> None:
    x, weight = torch.ones(16, 4), torch.tensor([[1.0, 3.0, 3.0, 3.0]])
    assert loudest(weight, seen_of(x, 4), 2).tolist() == [1, 2]
    assert loudest(weight, Seen(4, 4, CPU, fits=True), 1).tolist() == [1], "by the weight where no token was seen"


def test_columns_that_say_nothing_are_left_as_they_are() -> None:
    weight = torch.ones(2, 4)
    for seen in (Seen(4, 4, CPU, fits=True), seen_of(torch.zeros(32, 4), 4), seen_of(torch.ones(4, 4), 4)):
        fitted = fit_columns(weight, torch.tensor([0, 1]), seen)
        assert fitted.damp is None and torch.equal(fitted.weight, weight[:, :2])


def test_activations_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(NumericalError, match="NaN or Inf"):
        energies(torch.ones(2, 4), seen_of(torch.full((4, 4), float("nan")), 4, fits=False))


@given(st.sampled_from([1, 2]), st.integers(0, 50))
def test_the_piece_that_goes_is_the_one_that_a_fit_of_the_others_misses_least(size: int, seed: int) -> None:
    x, weight = correlated(200, 5 * size, seed), torch.randn(4, 5 * size, generator=torch.Generator().manual_seed(seed))
    seen = seen_of(x, 5)
    assert seen.gram is not None
    gram = seen.gram.xtx.double().numpy()
    gram = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))

    def missed(piece: int) -> float:
        """tr E H Eᵀ of what is lost, the others fitted: the Schur complement of H."""
        gone = np.arange(piece * size, (piece + 1) * size)
        left = np.setdiff1d(np.arange(5 * size), gone)
        rest = gram[np.ix_(gone, gone)] - gram[np.ix_(gone, left)] @ np.linalg.solve(
            gram[np.ix_(left, left)], gram[np.ix_(left, gone)]
        )
        part = weight.double().numpy()[:, gone]
        return float(np.trace(part @ rest @ part.T))

    found = least_missed(weight, seen, 4).tolist()
    assert sorted(set(range(5)) - set(found)) == [min(range(5), key=missed)]


def test_pieces_that_others_can_stand_in_for_go_before_quieter_ones() -> None:
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    x[:, 3] = x[:, 2]  # as loud as any, and said twice
    weight = torch.tensor([[1.0, 1.0, 2.0, 2.0]])
    seen = seen_of(x, 4)
    assert loudest(weight, seen, 3).tolist() != (found := least_missed(weight, seen, 3).tolist())
    assert {0, 1} < set(found)
    assert fit_columns(weight, torch.tensor(found), seen).after == pytest.approx(0, abs=1e-4)


def test_what_the_blocks_before_lack_is_fitted_too_by_half() -> None:
    generator = torch.Generator().manual_seed(4)
    x, weight, more = (
        correlated(400, 12),
        torch.randn(5, 12, generator=generator),
        torch.randn(5, 12, generator=generator),
    )
    seen = Seen(12, 12, CPU, fits=True)
    for part in x.split(7):
        seen.update(part, part @ more.T)
    fitted = fit_columns(weight, torch.arange(12), seen)
    assert torch.allclose(fitted.weight, weight + PULL * more, atol=0.05)
    assert fitted.after is not None and fitted.before is not None and fitted.after < 0.01 * fitted.before


def test_what_goes_is_chosen_by_what_the_rest_is_to_give() -> None:
    x = torch.eye(4).repeat(100, 1)
    weight, seen = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), Seen(4, 4, CPU, fits=True)
    seen.update(x, x @ torch.tensor([[10.0, 0.0, -6.0, 0.0]]).T)  # so that W comes to be 6, 2, 0, 4
    assert least_missed(weight, seen_of(x, 4), 2).tolist() == [2, 3]
    assert least_missed(weight, seen, 2).tolist() == [0, 3]
