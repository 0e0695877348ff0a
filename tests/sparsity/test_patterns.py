"""Masks have exact counts, whatever the shape, the blocks and the ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmsparse.errors import NumericalError, PatternError
from llmsparse.sparsity.patterns import NofM, Pattern, Unstructured, drop_first_of_sorted, parse_pattern

SCOPES = ("row", "matrix")
sizes = st.integers(1, 12)
fractions = st.floats(0.0, 0.999)
seeds = st.integers(0, 2**16)


def scores(rows: int, columns: int, seed: int, levels: int = 5) -> torch.Tensor:
    """Few levels, hence many ties."""
    return torch.randint(0, levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


def keep_all(pattern: Pattern, score: torch.Tensor) -> torch.Tensor:
    return pattern.keep(score, slice(0, score.shape[1]), score.shape[1])


def by_stable_sort(score: torch.Tensor, count: int) -> np.ndarray:
    """Each row without its `count` smallest, the first of equals first: the specification."""
    keep = np.ones(score.shape, dtype=bool)
    order = np.argsort(score.numpy(), axis=1, kind="stable")[:, :count]
    np.put_along_axis(keep, order, False, axis=1)
    return keep


def test_matrix_scope_by_hand() -> None:
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]])
    assert keep_all(Unstructured(0.5, "matrix"), score).tolist() == [[False] * 4, [True] * 4]


def test_row_scope_by_hand() -> None:
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]])
    expected = [[True, False, True, False], [True, True, False, False]]
    assert keep_all(Unstructured(0.5, "row"), score).tolist() == expected


def test_2_of_4_by_hand() -> None:
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0, 0.0, 0.0, 1.0]])
    assert keep_all(NofM(2, 4), score).tolist() == [[False, False, True, True, True, False, False, True]]


def test_counts_round_half_to_even() -> None:
    assert (~keep_all(Unstructured(0.5, "row"), torch.ones(1, 5))).sum() == 2
    assert (~keep_all(Unstructured(0.5, "row"), torch.ones(1, 7))).sum() == 4


@given(sizes, sizes, fractions, st.sampled_from(SCOPES), seeds)
def test_unstructured_drops_the_smallest_the_first_of_equals_first(
    rows: int, columns: int, sparsity: float, scope: str, seed: int
) -> None:
    score = scores(rows, columns, seed)
    keep = keep_all(Unstructured(sparsity, scope), score)  # pyright: ignore[reportArgumentType]
    flat = score if scope == "row" else score.reshape(1, -1)
    expected = by_stable_sort(flat, round(sparsity * flat.shape[1])).reshape(rows, columns)
    np.testing.assert_array_equal(keep.numpy(), expected)


@given(sizes, sizes, st.integers(1, 12), seeds)
def test_a_gpu_sorts_to_the_same_mask_without_making_the_host_wait(
    rows: int, columns: int, count: int, seed: int
) -> None:
    score = scores(rows, columns, seed)
    count = min(count, columns)
    np.testing.assert_array_equal(drop_first_of_sorted(score, count).numpy(), by_stable_sort(score, count))


@given(sizes, st.integers(1, 5), st.integers(2, 20), st.data())
def test_nofm_keeps_exactly_n_of_every_m_the_last_of_equals(
    rows: int, groups: int, m: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m - 1))
    score = scores(rows, groups * m, data.draw(seeds))
    keep = keep_all(NofM(n, m), score)
    assert (keep.view(-1, m).sum(dim=1) == n).all()
    np.testing.assert_array_equal(keep.view(-1, m).numpy(), by_stable_sort(score.view(-1, m), m - n))


@given(sizes, st.lists(st.integers(1, 9), min_size=1, max_size=6), fractions, st.sampled_from(SCOPES), seeds)
def test_column_blocks_add_up_to_the_exact_count(
    rows: int, blocks: list[int], sparsity: float, scope: str, seed: int
) -> None:
    pattern = Unstructured(sparsity, scope)  # pyright: ignore[reportArgumentType]
    width, start = sum(blocks), 0
    score, done = scores(rows, width, seed), []
    for size in blocks:
        stop = start + size
        done.append(pattern.keep(score[:, start:stop], slice(start, stop), width))
        zeros = ~torch.cat(done, dim=1)
        if scope == "matrix":
            assert int(zeros.sum()) == round(sparsity * (rows * stop))
        else:
            assert zeros.sum(dim=1).tolist() == [round(sparsity * stop)] * rows
        start = stop


def test_infinite_scores_stay_and_zero_scores_go_first() -> None:
    score = torch.tensor([[0.0, torch.inf, 1.0, 2.0], [3.0, 0.0, torch.inf, 0.5]])
    expected = [[False, True, True, True], [True, False, True, False]]
    assert keep_all(Unstructured(0.375, "matrix"), score).tolist() == expected


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5, "row"), Unstructured(0.5, "matrix"), NofM(2, 4), NofM(4, 8)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_views_and_large_inputs_are_scored_like_copies(pattern: Pattern, dtype: torch.dtype) -> None:
    score = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = score.clone()
    transposed = score.T.contiguous().T
    assert torch.equal(keep_all(pattern, score), keep_all(pattern, transposed))
    assert torch.equal(score, before)
    assert float(keep_all(pattern, score).float().mean()) == 0.5


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), Unstructured(0.5, "matrix"), NofM(2, 4)], ids=str)
def test_a_nan_score_is_an_error(pattern: Pattern) -> None:
    score = torch.ones(2, 4)
    score[1, 2] = torch.nan
    with pytest.raises(NumericalError, match="1 of 8 importance scores are NaN"):
        keep_all(pattern, score)


def test_opposite_infinities_are_not_taken_for_nan() -> None:
    score = torch.tensor([[torch.inf, -torch.inf, 1.0, 2.0]])
    assert keep_all(NofM(2, 4), score).tolist() == [[True, False, False, True]]


def test_a_width_that_groups_do_not_divide_is_named() -> None:
    with pytest.raises(PatternError, match=r"model\.down_proj: in_features 170 is not a multiple of 4, so 2:4 cannot"):
        NofM(2, 4).check("model.down_proj", (64, 170))
    NofM(2, 4).check("model.down_proj", (63, 172))
    Unstructured(0.3, "row").check("model.down_proj", (63, 171))


def test_columns_that_are_no_whole_groups_are_refused() -> None:
    for columns, count in ((slice(2, 6), 4), (slice(0, 6), 6)):
        with pytest.raises(PatternError, match="not whole groups of 4"):
            NofM(2, 4).keep(torch.ones(1, count), columns, 8)


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "0:0"])
def test_impossible_groups_are_refused(text: str) -> None:
    with pytest.raises(PatternError, match=f"pattern {text}: "):
        parse_pattern(text, None, "row")


@pytest.mark.parametrize("text", ["2x4", "2:4:8", "", "-2:4", "Unstructured", "2 of 4", "2:"])
def test_unknown_patterns_are_refused(text: str) -> None:
    with pytest.raises(PatternError, match="unknown pattern"):
        parse_pattern(text, 0.5, "row")


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 70.0, float("nan"), float("inf")])
def test_a_sparsity_that_is_no_fraction_is_refused(sparsity: float) -> None:
    with pytest.raises(PatternError, match="not a fraction"):
        parse_pattern("unstructured", sparsity, "row")


def test_unstructured_needs_a_sparsity() -> None:
    with pytest.raises(PatternError, match="needs a sparsity"):
        parse_pattern("unstructured", None, "row")


def test_a_pattern_and_another_sparsity_contradict() -> None:
    with pytest.raises(PatternError, match=r"2:4 means sparsity 0\.5, not 0\.7"):
        parse_pattern("2:4", 0.7, "row")
    assert parse_pattern("2:4", 0.5, "row") == NofM(2, 4)
    assert parse_pattern("1:3", 0.666667, "row") == NofM(1, 3)


@pytest.mark.parametrize("pattern", [Unstructured(0.3, "row"), NofM(2, 4), NofM(4, 8)], ids=str)
def test_text_and_pattern_agree(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern), pattern.sparsity, "row") == pattern


def test_sparsity_of_n_of_m_is_the_fraction_of_zeros() -> None:
    assert NofM(2, 4).sparsity == 0.5
    assert NofM(1, 8).sparsity == 0.875
    assert (NofM(1, 8).span, Unstructured(0.5, "row").span) == (8, 1)
