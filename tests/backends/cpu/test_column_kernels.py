"""Products that read some of the columns, against the torch sentence in float64, by every kernel that this CPU has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmsparse.backends.cpu import columns
from llmsparse.backends.cpu.columns import Columns
from llmsparse.errors import RecipeError
from llmsparse.sparsity.activation import Cut, column_norms

BF16, FP32 = torch.bfloat16, torch.float32
NAMES = ("avx512", "avx512-vbmi2", "avx2", "portable")
KERNELS = [(name, dtype, packed) for name in NAMES for dtype in (BF16, FP32) for packed in (False, True)]
every_kernel = pytest.mark.parametrize(
    ("kernel", "dtype", "packed"), KERNELS, ids=lambda value: str(value).removeprefix("torch.")
)


def tensors(out: int, width: int, rows: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with zeros, x and a bias."""
    generator = torch.Generator().manual_seed(seed)
    weight, x, bias = (torch.randn(shape, generator=generator) for shape in ((out, width), (rows, width), (out,)))
    return (weight * (torch.rand(out, width, generator=generator) > 0.6)).to(dtype), x.to(dtype), bias.to(dtype)


def skip_unless_here(kernel: str, dtype: torch.dtype, packed: bool) -> None:
    if kernel not in columns.kernels(dtype, packed):
        pytest.skip(f"this CPU, or this kind of weight, has no {kernel}")


def stored(weight: Tensor, packed: bool) -> Columns:
    return Columns.without_zeros(weight) if packed else Columns.of(weight)


def cuts(weight: Tensor, seed: int) -> list[Cut]:
    """By every rule, with and without norms and a centre."""
    width = weight.shape[1]
    norms = column_norms(weight)
    centre = torch.randn(width, generator=torch.Generator().manual_seed(seed)) / 2
    both: list[Cut] = [Cut(threshold=0.7), Cut(threshold=0.7, norms=norms, centre=centre), Cut(threshold=-1.0)]
    return [*both, Cut(keep=width // 2, norms=norms), Cut(keep=min(1, width), centre=centre), Cut(keep=0)]


@every_kernel
@settings(max_examples=12)
@given(
    st.sampled_from((1, 31, 32, 33, 511, 513, 1100)),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 9),
    st.booleans(),
)
def test_products_are_those_of_the_cut_inputs_but_for_rounding(
    kernel: str, dtype: torch.dtype, packed: bool, out: int, width: int, rows: int, seed: int, with_bias: bool
) -> None:
    skip_unless_here(kernel, dtype, packed)
    weight, x, bias = tensors(out, width, rows, dtype, seed)
    for cut in cuts(weight, seed):
        y = columns.product(stored(weight, packed), cut, x, bias if with_bias else None, kernel=kernel)
        a, b, c = (one.double().numpy() for one in (cut(x), weight, bias))
        wanted, magnitude = a @ b.T + c * with_bias, np.abs(a) @ np.abs(b).T + np.abs(c)
        rounding = 2**-8 if dtype == BF16 else 2**-24
        assert y.dtype == dtype and y.shape == (rows, out)
        assert np.all(np.abs(y.double().numpy() - wanted) <= rounding * np.abs(wanted) + 1e-6 * magnitude)


@every_kernel
def test_a_token_gives_the_same_bits_alone_and_among_others_on_any_number_of_threads(
    kernel: str, dtype: torch.dtype, packed: bool, threads: None
) -> None:
    skip_unless_here(kernel, dtype, packed)
    weight, x, bias = tensors(9100, 50, 6, dtype, 0)  # eighteen tiles, more than the sums of one pass
    held, cut = stored(weight, packed), Cut(threshold=0.7, norms=column_norms(weight) / 30)
    torch.set_num_threads(1)
    wanted = torch.cat([columns.product(held, cut, row[None], bias, kernel=kernel) for row in x])
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        assert torch.equal(columns.product(held, cut, x, bias, kernel=kernel), wanted)


def test_columns_that_do_not_count_are_not_read() -> None:
    weight, x, _ = tensors(64, 16, 1, FP32, 0)
    cut = Cut(threshold=0.7)
    wanted = columns.product(Columns.of(weight), cut, x)
    weight[:, x[0].abs() <= 0.7] = torch.nan
    assert torch.equal(columns.product(Columns.of(weight.contiguous()), cut, x), wanted)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_weight_without_its_zeros_is_that_weight(dtype: torch.dtype) -> None:
    weight = tensors(1100, 33, 1, dtype, 4)[0]
    held = Columns.without_zeros(weight)
    assert torch.equal(held.dense(), weight) and torch.equal(Columns.of(weight).dense(), weight)
    assert held.nbytes < 0.8 * weight.nbytes or dtype == BF16


def test_a_weight_that_lies_by_columns_is_not_copied() -> None:
    weight = torch.randn(8, 5).T.contiguous().T
    assert Columns.of(weight).values.data_ptr() == weight.data_ptr()


def test_what_is_no_number_counts() -> None:
    x = torch.tensor([[float("nan"), 0.0, 3.0]])
    assert columns.product(Columns.of(torch.ones(4, 3)), Cut(threshold=1.0), x).isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    weight, x, bias = tensors(8, 5, 1, FP32, 0)
    held = Columns.of(weight)
    for wrong in (x[:, :4], x.to(BF16), x[:0]):
        with pytest.raises(ValueError, match="wanted"):
            columns.product(held, Cut(threshold=0.0), wrong)
    with pytest.raises(ValueError, match="norms or centre"):
        columns.product(held, Cut(threshold=0.0, norms=torch.ones(4)), x)
    with pytest.raises(ValueError, match="bias"):
        columns.product(held, Cut(threshold=0.0), x, bias[:2])
    with pytest.raises(RecipeError, match="bfloat16 or float32"):
        columns.kernels(torch.float16)
