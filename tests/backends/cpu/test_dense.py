"""Products with dense weights against float64, by every kernel that this CPU has, however many threads and tokens there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmsparse.backends.cpu import dense
from llmsparse.errors import RecipeError

BF16, FP32 = torch.bfloat16, torch.float32
KERNELS = [
    ("avx512-bf16", BF16),
    ("avx512", BF16),
    ("avx512", FP32),
    ("avx2", BF16),
    ("avx2", FP32),
    ("portable", BF16),
    ("portable", FP32),
]
every_kernel = pytest.mark.parametrize(
    ("kernel", "dtype"), KERNELS, ids=lambda value: str(value).removeprefix("torch.")
)


def tensors(out: int, width: int, rows: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """A weight, x and a bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((out, width), (rows, width), (out,))
    weight, x, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return weight, x, bias


def skip_unless_here(kernel: str, dtype: torch.dtype) -> None:
    if kernel not in dense.kernels(dtype):
        pytest.skip(f"this CPU cannot run {kernel}")


@every_kernel
@given(
    st.integers(1, 20),
    st.sampled_from((1, 7, 31, 32, 33, 127, 128, 129, 300)),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 9),
)
def test_products_are_exact_but_for_rounding(
    kernel: str, dtype: torch.dtype, out: int, width: int, rows: int, with_bias: bool, seed: int
) -> None:
    skip_unless_here(kernel, dtype)
    weight, x, bias = tensors(out, width, rows, dtype, seed)
    y = dense.matvec(weight, x, bias if with_bias else None, kernel=kernel)
    a, b, c = (one.double().numpy() for one in (x, weight, bias))
    wanted, magnitude = a @ b.T + c * with_bias, np.abs(a) @ np.abs(b).T + np.abs(c)
    rounding = 2**-8 if dtype == BF16 else 2**-24
    assert y.dtype == dtype and y.shape == (rows, out)
    assert np.all(np.abs(y.double().numpy() - wanted) <= rounding * np.abs(wanted) + 1e-6 * magnitude)


@every_kernel
def test_a_token_gives_the_same_bits_alone_and_among_others_on_any_number_of_threads(
    kernel: str, dtype: torch.dtype, threads: None
) -> None:
    skip_unless_here(kernel, dtype)
    for width in (200, 20000):  # of the wide ones fewer pass over a weight at once
        weight, x, bias = tensors(67, width, 9, dtype)
        torch.set_num_threads(1)
        wanted = torch.cat([dense.matvec(weight, row[None], bias, kernel=kernel) for row in x])
        for number in (1, 2, 3, 40):  # 67 rows are 17 tiles
            torch.set_num_threads(number)
            assert torch.equal(dense.matvec(weight, x, bias, kernel=kernel), wanted)


def test_numbers_that_are_none_stay_so() -> None:
    weight, x, _ = tensors(5, 40, 1, BF16)
    weight[1, 3], weight[2, 39], x[0, 3] = torch.inf, torch.nan, 0
    y = dense.matvec(weight, x)[0]
    assert y.isnan().tolist() == [False, True, True, False, False]


def test_views_are_read_as_what_they_show() -> None:
    weight, x, bias = tensors(8, 64, 2, FP32)
    wanted = dense.matvec(weight[:, ::2].clone(), x[:, ::2].clone(), bias)
    assert torch.equal(dense.matvec(weight[:, ::2], x[:, ::2], bias), wanted)
    assert dense.matvec(weight, x[None]).shape == (1, 2, 8)


@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.ones(1, 5), None),
        (torch.ones(0, 4), None),
        (torch.ones(1, 4), torch.ones(2)),
        (torch.ones(1, 4, dtype=BF16), None),
        (torch.ones(1, 4), torch.ones(3, dtype=BF16)),
        (torch.ones(1, 4, device="meta"), None),
    ],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, bias: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="wanted"):
        dense.matvec(torch.ones(3, 4), x, bias)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(RecipeError, match="bfloat16 or float32"):
        dense.kernels(torch.float16)


def test_fewer_tokens_pay_where_rows_are_longer() -> None:
    limits = [dense.kernel_rows(BF16, width) for width in (64, 3072, 3073, 8192, 8193, 10**6)]
    assert limits == sorted(limits, reverse=True) and limits[0] == limits[1] and limits[2] == limits[3]
