"""RMSNorm by every kernel that this CPU has, against the sentence that transformers' models say it in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmsparse.backends.cpu.norm import kernels, rms_norm
from llmsparse.errors import RecipeError

KERNELS = [(name, dtype) for name in ("avx512", "avx2", "portable") for dtype in (torch.bfloat16, torch.float32)]
every_kernel = pytest.mark.parametrize(
    ("kernel", "dtype"), KERNELS, ids=lambda value: str(value).removeprefix("torch.")
)


def sentence(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def skip_unless_here(kernel: str, dtype: torch.dtype) -> None:
    if kernel not in kernels(dtype):
        pytest.skip(f"this CPU cannot run {kernel}")


@every_kernel
@given(st.integers(1, 9), st.sampled_from((1, 15, 16, 17, 63, 64, 65, 300)), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_rows_are_divided_by_their_root_mean_square(
    kernel: str, dtype: torch.dtype, rows: int, width: int, scale: float, seed: int
) -> None:
    skip_unless_here(kernel, dtype)
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(2, rows, width, generator=generator)).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)
    y, wanted = rms_norm(x, weight, 1e-6, kernel=kernel), sentence(x, weight, 1e-6)
    # where the quotient lies between two numbers it may be the other one, 2⁻⁷ away, and then each product is rounded, by 2⁻⁸
    step = 2**-6 if dtype == torch.bfloat16 else 2**-21
    assert y.dtype == dtype and y.shape == x.shape and bool(((y - wanted).abs() <= step * wanted.abs()).all())


@every_kernel
def test_the_result_depends_neither_on_threads_nor_on_other_rows(
    kernel: str, dtype: torch.dtype, threads: None
) -> None:
    skip_unless_here(kernel, dtype)
    x, weight = torch.randn(7, 100).to(dtype), torch.randn(100).to(dtype)
    torch.set_num_threads(1)
    alone = torch.cat([rms_norm(row[None], weight, 1e-5, kernel=kernel) for row in x])
    for number in (1, 2, 3, 20):
        torch.set_num_threads(number)
        assert torch.equal(rms_norm(x, weight, 1e-5, kernel=kernel), alone)


@every_kernel
def test_numbers_that_are_none_and_rows_of_zeros(kernel: str, dtype: torch.dtype) -> None:
    skip_unless_here(kernel, dtype)
    x, weight = torch.zeros(4, 33, dtype=dtype), torch.ones(33, dtype=dtype)
    x[1, 5], x[2, 32], x[3, 0] = torch.nan, torch.inf, 1
    y = rms_norm(x, weight, 1e-6, kernel=kernel)
    assert not y[0].any() and bool(y[1].isnan().all()) and bool(y[2, 32].isnan()) and not y[2, :32].any()
    assert y[3, 0] == sentence(x, weight, 1e-6)[3, 0]


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.ones(8)
    for x in (torch.ones(1, 7), torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(1, 8, device="meta")):
        with pytest.raises(ValueError, match="wanted"):
            rms_norm(x, weight, 1e-6)
    with pytest.raises(RecipeError, match="bfloat16 or float32"):
        kernels(torch.float16)
    assert rms_norm(torch.ones(0, 8), weight, 1e-6).shape == (0, 8)
