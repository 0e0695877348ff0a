"""Inputs left out of a product, against WINA's and TEAL's equations in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmsparse.sparsity.activation import Cut, column_norms, scores, threshold_at


def drawn(seed: int, tokens: int, width: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator), torch.randn(out, width, generator=generator)


@given(st.integers(0, 1000), st.integers(1, 40), st.floats(0, 3))
def test_teal_multiplies_what_is_larger_than_the_threshold(seed: int, width: int, threshold: float) -> None:
    x, weight = drawn(seed, 3, width, 5)
    kept = np.where(np.abs(x.numpy()) > np.float32(threshold), x.numpy(), 0)
    assert np.array_equal(Cut(threshold=float(np.float32(threshold)))(x).numpy(), kept)
    assert np.allclose(
        (Cut(threshold=float(np.float32(threshold)))(x) @ weight.T).numpy(), kept @ weight.numpy().T, atol=1e-5
    )


@given(st.integers(0, 1000), st.integers(1, 40), st.data())
def test_wina_keeps_the_largest_by_size_times_norm_of_the_column(seed: int, width: int, data: st.DataObject) -> None:
    x, weight = drawn(seed, 4, width, 6)
    keep = data.draw(st.integers(0, width))
    score = np.abs(x.numpy()) * np.sqrt((weight.numpy() ** 2).sum(axis=0))
    wanted = np.zeros_like(score)
    for row, found in enumerate(score):
        for place in np.argsort(-found, kind="stable")[:keep]:
            wanted[row, place] = x[row, place]
    cut = Cut(keep=keep, norms=column_norms(weight))
    assert np.array_equal(cut(x).numpy(), wanted)


def test_hand_worked_the_two_scores_keep_different_inputs() -> None:
    weight = torch.tensor([[3.0, 0.1, 0.0], [4.0, 0.0, 1.0]])  # columns of norm 5, 0.1 and 1
    x = torch.tensor([[1.0, -9.0, 2.0]])
    assert column_norms(weight).tolist() == [5.0, pytest.approx(0.1), 1.0]
    assert Cut(keep=1)(x).tolist() == [[0.0, -9.0, 0.0]]
    assert Cut(keep=1, norms=column_norms(weight))(x).tolist() == [[1.0, 0.0, 0.0]]
    assert Cut(threshold=2.0, norms=column_norms(weight))(x).tolist() == [[1.0, 0.0, 0.0]]


def test_with_a_centre_what_is_far_from_it_counts_and_as_the_difference() -> None:
    centre = torch.tensor([1.0, 1.0, -2.0])
    x = torch.tensor([[1.25, 4.0, 0.0]])
    assert Cut(threshold=0.5, centre=centre)(x).tolist() == [[0.0, 3.0, 2.0]]


@given(st.integers(0, 1000), st.floats(0, 1))
def test_a_threshold_leaves_out_the_share_that_was_asked_for(seed: int, share: float) -> None:
    found = scores(drawn(seed, 8, 25, 1)[0], None)
    assert int((found <= threshold_at(found, share)).sum()) == round(share * 200)


def test_what_is_no_number_is_not_lost() -> None:
    x = torch.tensor([[float("nan"), 0.1, 5.0]])
    assert Cut(threshold=1.0)(x).isnan().tolist() == [[True, False, False]]
    assert Cut(keep=1)(x).isnan().any()


def test_nothing_is_left_out_by_a_threshold_below_zero() -> None:
    x = torch.tensor([[0.0, -0.0, 1e-40]])
    assert Cut(threshold=threshold_at(x, 0.0)).counts(x).all()
