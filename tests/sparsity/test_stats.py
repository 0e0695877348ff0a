"""Statistics equal numpy's in float64, however the tokens come in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmsparse.errors import NumericalError
from llmsparse.sparsity.stats import Gram, InputMoments, InputNorm, Statistic, combine

CPU = torch.device("cpu")
KINDS = (InputNorm, InputMoments, Gram)


def tokens(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs of very different sizes, and with means far from zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator) * torch.logspace(-2, 2, width)
    return x + 10 * torch.randn(width, generator=generator)


def seen(kind: type[InputNorm], x: torch.Tensor, cuts: list[int]) -> InputNorm:
    stat = kind(x.shape[1], CPU)
    for part in torch.tensor_split(x, sorted(cuts)):
        stat.update(part)
    return stat


def assert_equals_numpy(stat: InputNorm, x: torch.Tensor) -> None:
    exact = x.double().numpy()
    size = np.abs(exact).max(axis=0)
    assert stat.tokens == len(exact)
    np.testing.assert_allclose(stat.norm.numpy(), np.linalg.norm(exact, axis=0), rtol=1e-6)
    if isinstance(stat, InputMoments):
        assert (np.abs(stat.mean.numpy() - exact.mean(axis=0)) <= 1e-6 * size).all()
        assert (np.abs(np.sqrt(stat.variance.numpy()) - exact.std(axis=0)) <= 1e-6 * size).all()
    if isinstance(stat, Gram):
        bound = 5e-6 * len(exact) * np.outer(size, size)
        assert (np.abs(stat.xtx.numpy() - exact.T @ exact) <= bound).all()
        assert torch.equal(stat.xtx, stat.xtx.T)


@given(st.integers(1, 40), st.integers(1, 9), st.lists(st.integers(0, 40), max_size=4), st.sampled_from(KINDS))
def test_equals_numpy_however_tokens_are_batched(
    count: int, width: int, cuts: list[int], kind: type[InputNorm]
) -> None:
    x = tokens(count, width)
    assert_equals_numpy(seen(kind, x, cuts), x)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_numpy_on_many_tokens(kind: type[InputNorm]) -> None:
    x = tokens(5000, 12)
    assert_equals_numpy(seen(kind, x, [17, 1000, 4000]), x)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_like_having_seen_both(kind: type[InputNorm]) -> None:
    x = tokens(3000, 8)
    stat, other = seen(kind, x[:100], []), seen(kind, x[100:], [500])
    stat.merge(other)
    assert_equals_numpy(stat, x)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_with_one_that_saw_nothing_changes_nothing(kind: type[InputNorm]) -> None:
    x = tokens(300, 8)
    stat, empty = seen(kind, x, []), kind(8, CPU)
    stat.merge(kind(8, CPU))
    assert_equals_numpy(stat, x)
    empty.merge(stat)
    assert_equals_numpy(empty, x)


def test_variance_survives_a_mean_ten_thousand_times_as_large() -> None:
    x = 1e4 + torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
    stat = seen(InputMoments, x, list(range(0, 20000, 500)))
    assert isinstance(stat, InputMoments)
    np.testing.assert_allclose(stat.variance.numpy(), x.double().numpy().var(axis=0), rtol=1e-3)


def test_gram_of_an_input_wider_than_a_strip_is_whole() -> None:
    x = tokens(64, 700, seed=1) / 10
    assert_equals_numpy(seen(Gram, x, [20]), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_is_summed_in_fp32_and_left_alone(kind: type[InputNorm], dtype: torch.dtype) -> None:
    x = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    stat = seen(kind, x, [])
    assert torch.equal(x, before)
    assert stat.norm.dtype == torch.float32
    np.testing.assert_allclose(stat.norm.numpy(), np.linalg.norm(x.double().numpy(), axis=0), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_activation_is_an_error(kind: type[InputNorm], value: float) -> None:
    x = torch.ones(4, 3)
    x[2, 1] = value
    stat = seen(kind, x, [])
    with pytest.raises(NumericalError, match="NaN or Inf in 1 of 3 inputs after 4 tokens"):
        _ = stat.norm


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_was_never_active_has_norm_zero(kind: type[InputNorm]) -> None:
    x = tokens(50, 4)
    x[:, 2] = 0.0
    assert (seen(kind, x, [7]).norm == 0).tolist() == [False, False, True, False]


def test_a_factor_is_made_once_until_more_tokens_come() -> None:
    stat, numbers = Gram(4, CPU), iter(range(10))
    stat.update(tokens(50, 4))
    assert [stat.factor(key, lambda: next(numbers)) for key in "aab"] == [0, 0, 1]
    stat.update(tokens(5, 4))
    assert stat.factor("a", lambda: next(numbers)) == 2
    stat.merge(Gram(4, CPU))
    assert stat.factor("a", lambda: next(numbers)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_nbytes_is_what_is_held(kind: type[InputNorm]) -> None:
    stat = seen(kind, tokens(50, 64), [])
    tensors = [value for value in vars(stat).values() if isinstance(value, torch.Tensor)]
    held = sum(tensor.nbytes for tensor in [*tensors, *getattr(stat, "_strips", [])])
    assert held == kind.nbytes(64)


def test_each_kind_stands_in_for_the_poorer_ones() -> None:
    x = tokens(100, 6)
    norm, moments, gram = (seen(kind, x, [40]) for kind in KINDS)
    assert isinstance(gram, InputMoments)
    assert isinstance(moments, InputMoments)
    torch.testing.assert_close(norm.norm, gram.norm)
    assert torch.equal(moments.mean, gram.mean)
    assert torch.equal(moments.variance, gram.variance)


def test_combine_gives_the_richer() -> None:
    order: list[type[Statistic] | None] = [None, *KINDS]
    for i, a in enumerate(order):
        for j, b in enumerate(order):
            assert combine(a, b) is order[max(i, j)]
