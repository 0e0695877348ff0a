"""Swaps by the exact error of a row, against the same in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmsparse.errors import RecipeError
from llmsparse.pruners import Magnitude, SparseGPT, Swaps, Wanda
from llmsparse.pruners.protocol import Pruned, Pruner
from llmsparse.sparsity.patterns import NofM, Pattern, Unstructured
from llmsparse.sparsity.stats import Gram

GENERATOR = torch.Generator()


def problem(seed: int, out: int = 5, width: int = 12) -> tuple[Tensor, Gram]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    stat = Gram(width, torch.device("cpu"))
    stat.update(torch.randn(200, width, generator=generator) @ mixing)
    return torch.randn(out, width, generator=generator), stat


def errors(weight: Tensor, made: Tensor, stat: Gram, damp: float) -> np.ndarray:
    """The damped output error of each row, (out,)."""
    h = stat.xtx.double().numpy()
    h = h + damp * np.diag(h).mean() * np.eye(len(h))
    left = (weight - made).double().numpy()
    return np.einsum("oi,ij,oj->o", left, h, left)


def best_swap(weight: Tensor, pruned: Pruned, stat: Gram, damp: float, span: int) -> np.ndarray:
    """What the best swap of every row would change its error by, trying each."""
    before, least = errors(weight, pruned.weight, stat, damp), np.full(len(weight), np.inf)
    for i, j in itertools.permutations(range(weight.shape[1]), 2):
        if span > 1 and i // span != j // span:
            continue
        swapped = pruned.weight.clone()
        swapped[:, i], swapped[:, j] = weight[:, i], 0.0
        change = errors(weight, swapped, stat, damp) - before
        possible = (~pruned.keep[:, i] & pruned.keep[:, j]).numpy()
        least = np.where(possible & (change < least), change, least)
    return least


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 99),
    pattern=st.sampled_from([Unstructured(0.5, "row"), Unstructured(0.7, "matrix"), NofM(2, 4)]),
    initial=st.sampled_from([Magnitude(), Wanda(), SparseGPT()]),
)
def test_counts_stay_no_row_ends_worse_and_no_swap_is_left_that_helps(
    seed: int, pattern: Pattern, initial: Pruner
) -> None:
    weight, stat = problem(seed)
    method = Swaps(initial, solve_iterations=0)
    start = initial(weight, stat, pattern, GENERATOR)
    end = method(weight, stat, pattern, GENERATOR)
    assert torch.equal(start.keep.sum(dim=1), end.keep.sum(dim=1))
    if isinstance(pattern, NofM):
        assert (end.keep.view(5, 3, 4).sum(dim=2) == 2).all()
    before, after = (errors(weight, one.weight, stat, method.damp) for one in (start, end))
    assert (after <= before * (1 + 1e-5)).all()
    assert (best_swap(weight, end, stat, method.damp, pattern.span) > -1e-5 * after - 1e-9).all()


def test_a_swap_worked_out_by_hand() -> None:
    """H = [[1, 0.9], [0.9, 1]] beside a third input of its own: of w = (1, 1, 1.2) magnitude keeps the third, and its error
    (1, 1) H (1, 1)ᵀ = 3.8 falls to 1 + 1.44 when the first returns for it: 2.44."""
    h = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    stat = Gram(3, torch.device("cpu"))
    stat.update(torch.linalg.cholesky(h).T)
    weight = torch.tensor([[1.0, 1.0, 1.2]])
    method = Swaps(Magnitude(), damp=1e-9, solve_iterations=0)
    pruned = method(weight, stat, Unstructured(2 / 3, "row"), GENERATOR)
    assert pruned.keep[0, :2].sum() == 1 and pruned.weight[0, 2] == 0 and pruned.notes["swaps"] == 1
    assert errors(weight, pruned.weight, stat, 1e-9)[0] == pytest.approx(2.44, rel=1e-5)


def test_at_the_end_weights_are_the_least_squares_of_their_support() -> None:
    weight, stat = problem(3)
    pruned = Swaps()(weight, stat, Unstructured(0.5, "row"), GENERATOR)
    h = stat.xtx.double().numpy()
    h = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
    for row, keep, found in zip(weight.double().numpy(), pruned.keep.numpy(), pruned.weight.numpy(), strict=True):
        wanted = np.linalg.solve(h[np.ix_(keep, keep)], (h @ row)[keep])
        np.testing.assert_allclose(found[keep], wanted, rtol=2e-3, atol=1e-4)


def test_swaps_that_cannot_be() -> None:
    with pytest.raises(RecipeError, match="give damp above 0"):
        Swaps(damp=0.0)
