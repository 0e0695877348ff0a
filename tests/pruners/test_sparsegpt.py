"""SparseGPT: the paper's sweep, its counts, its damping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmsparse.errors import NumericalError, RecipeError
from llmsparse.pruners import SparseGPT
from llmsparse.sparsity.patterns import NofM, Pattern, Unstructured
from llmsparse.sparsity.stats import Gram

Layer = tuple[torch.Tensor, Gram]


def as_in_the_paper(weight: torch.Tensor, stat: Gram, pattern: Pattern, block: int, damp: float = 0.01) -> np.ndarray:
    """Algorithm 1 in float64, written with the Cholesky factor of the inverse Hessian."""
    w, h = weight.double().numpy().copy(), stat.xtx.double().numpy()
    u = np.linalg.cholesky(np.linalg.inv(h + damp * h.diagonal().mean() * np.eye(len(h)))).T
    width = len(h)
    keep = np.ones_like(w, dtype=bool)
    for a in range(0, width, block):
        b = min(a + block, width)
        errors = np.zeros((len(w), b - a))
        for j in range(a, b):
            span = b - a if pattern.span == 1 else pattern.span
            if (j - a) % span == 0:
                score = w[:, j : j + span] ** 2 / u.diagonal()[j : j + span] ** 2
                keep[:, j : j + span] = pattern.keep(torch.from_numpy(score), slice(j, j + span), width).numpy()
            errors[:, j - a] = np.where(keep[:, j], 0.0, w[:, j]) / u[j, j]
            w[:, j:b] -= errors[:, [j - a]] * u[j, j:b]
        w[:, b:] -= errors @ u[a:b, b:]
    return np.where(keep, w, 0.0)


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5, "matrix"), Unstructured(0.6, "row"), NofM(2, 4), NofM(4, 8)], ids=repr
)
def test_equals_the_paper_in_numpy(
    pattern: Pattern, block: int, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(24, 136)
    result = SparseGPT(block=block)(weight, stat, pattern, generator)
    np.testing.assert_allclose(result.weight.numpy(), as_in_the_paper(weight, stat, pattern, block), atol=2e-5)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "matrix"), Unstructured(0.6, "row"), NofM(2, 4)], ids=repr)
def test_a_block_in_one_launch_equals_the_paper_too(
    pattern: Pattern, correlated: Callable[..., Layer], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparseGPT, "_launches", staticmethod(lambda device, columns, pattern: True))  # pyright: ignore
    weight, stat = correlated(12, 72)
    result = SparseGPT(block=32)(weight, stat, pattern, generator)
    np.testing.assert_allclose(result.weight.numpy(), as_in_the_paper(weight, stat, pattern, 32), atol=2e-5)


def test_two_columns_by_hand(generator: torch.Generator) -> None:
    # H = [[1, ½], [½, 1]], no damping to speak of: 1 / (H⁻¹)_11 = ¾ and 1 / H_22 = 1, so the scores of w = (1, 1) are ¾ and 1.
    # Pruning the first moves the second by +w₁ H_12 / H_22.
    stat = Gram(2, torch.device("cpu"))
    stat.update(torch.tensor([[1.0, 0.5], [0.0, 0.75**0.5]]))
    result = SparseGPT(damp=1e-6)(torch.tensor([[1.0, 1.0]]), stat, Unstructured(0.5, "matrix"), generator)
    torch.testing.assert_close(result.weight, torch.tensor([[0.0, 1.5]]), atol=1e-4, rtol=0)


def test_equals_magnitude_on_uncorrelated_inputs_of_one_size(generator: torch.Generator) -> None:
    stat = Gram(16, torch.device("cpu"))
    stat.update(torch.eye(16))
    weight = torch.randn(8, 16, generator=generator)
    result = SparseGPT()(weight, stat, Unstructured(0.5, "matrix"), generator)
    assert torch.equal(result.keep, weight.abs() > weight.abs().flatten().sort().values[63])
    assert torch.equal(result.weight, weight * result.keep)


@pytest.mark.parametrize("block", [8, 32])
def test_every_column_block_holds_its_share(
    block: int, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(7, 50)
    keep = SparseGPT(block=block)(weight, stat, Unstructured(0.3, "matrix"), generator).keep
    for stop in (*range(block, 50, block), 50):
        assert int((~keep[:, :stop]).sum()) == round(0.3 * (7 * stop))


def test_weights_of_one_input_share_one_factorization(
    correlated: Callable[..., Layer], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, stat = correlated(8, 64)
    made, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: made.append(1) or cholesky(*a, **k))
    for _ in range(3):
        SparseGPT()(weight, stat, NofM(2, 4), generator)
    assert len(made) == 1
    SparseGPT(damp=0.1)(weight, stat, NofM(2, 4), generator)
    assert len(made) == 2


def test_damping_that_is_too_small_is_raised_and_reported(generator: torch.Generator) -> None:
    weight, stat = torch.randn(4, 64, generator=generator), Gram(64, torch.device("cpu"))
    stat.update(1000 * torch.randn(2, 64, generator=generator))  # rank 2 of 64
    result = SparseGPT(damp=1e-9)(weight, stat, Unstructured(0.5, "matrix"), generator)
    damp = result.notes["damp"]
    assert isinstance(damp, float)
    assert 1e-9 < damp <= 1e-5 * 1.01
    assert result.weight.isfinite().all()
    assert SparseGPT()(weight, stat, Unstructured(0.5, "matrix"), generator).notes == {}


def test_a_hessian_beyond_damping_is_an_error(generator: torch.Generator) -> None:
    weight, stat = torch.randn(4, 8, generator=generator), Gram(8, torch.device("cpu"))
    stat.update(torch.randn(50, 8, generator=generator))
    stat.xtx.fill_diagonal_(1.0).neg_()  # no Gram matrix of anything
    with pytest.raises(NumericalError, match="Hessian of 8 inputs is not positive definite after 50 tokens"):
        SparseGPT()(weight, stat, Unstructured(0.5, "matrix"), generator)


@pytest.mark.parametrize("options", [{"block": 0}, {"damp": 0.0}, {"damp": -1.0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        SparseGPT(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("pattern", [NofM(2, 4), Unstructured(0.5, "matrix")])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error(
    pattern: Pattern, broken: float, correlated: Callable[..., Any], generator: torch.Generator
) -> None:
    weight, stat = correlated(8, 32)
    weight[3, 5] = broken
    with pytest.raises(NumericalError):
        SparseGPT()(weight, stat, pattern, generator)


def test_finiteness_is_looked_at_once_a_weight_not_once_a_group(
    correlated: Callable[..., Any], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look makes a GPU wait; of 2:4 groups there are thousands."""
    from llmsparse.pruners import sparsegpt
    from llmsparse.sparsity import patterns

    looks: list[torch.Size] = []
    for module in (patterns, sparsegpt):
        monkeypatch.setattr(module, "refuse_nan", lambda score: looks.append(score.shape))
    SparseGPT()(*correlated(8, 64), NofM(2, 4), generator)
    assert looks == [(8, 64)]
