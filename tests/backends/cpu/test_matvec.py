"""Products and unpacked weights against float64, by every kernel that this CPU has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_weights import n_of_m, sparse
from torch import Tensor
from torch.nn.functional import linear

from llmsparse.backends.cpu import (
    CpuWeight,
    expand,
    kernel_rows,
    kernels,
    matvec,
    nested,
    prepare,
    rows_beside_copy,
)
from llmsparse.backends.cpu.library import BESIDE_AMX, KERNEL_ROWS, rows_up_to
from llmsparse.formats.bitmask import Bitmask

BF16, FP32 = torch.bfloat16, torch.float32
KERNELS = [  # kernel, dtype of the weight, dtype of x
    ("avx512-bf16", BF16, BF16),
    ("avx512-vbmi2", BF16, BF16),
    ("avx512-vbmi2", BF16, FP32),
    ("avx512-fp32", FP32, FP32),
    ("avx512-fp32", FP32, BF16),
    ("avx2", BF16, BF16),
    ("avx2", BF16, FP32),
    ("avx2", FP32, FP32),
    ("portable", BF16, BF16),
    ("portable", BF16, FP32),
    ("portable", FP32, FP32),
    ("portable", FP32, BF16),
]
WIDTHS = (1, 7, 31, 32, 33, 63, 64, 65, 100, 4096 + 3)
every_kernel = pytest.mark.parametrize(
    ("kernel", "dtype", "x_dtype"), KERNELS, ids=lambda value: str(value).removeprefix("torch.")
)


def packed(weight: Tensor, pattern: str = "unstructured") -> CpuWeight:
    return prepare(Bitmask.pack(weight, pattern))


def exact(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> np.ndarray:
    y = x.double().numpy() @ weight.double().numpy().T
    return y if bias is None else y + bias.double().numpy()


def check(weight: Tensor, x: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
    """Half a unit of the last place that y has, and what summing in float32 may lose."""
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], weight.shape[0])
    wanted = exact(weight, x, bias)
    magnitude = exact(weight.abs(), x.abs(), None if bias is None else bias.abs())
    rounding = 2**-8 if x.dtype == BF16 else 2**-24
    assert np.all(np.abs(y.double().numpy() - wanted) <= rounding * np.abs(wanted) + 1e-6 * magnitude)


def skip_unless_here(kernel: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    if kernel not in kernels(dtype, x_dtype):
        pytest.skip(f"this CPU cannot run {kernel}")


@every_kernel
@pytest.mark.parametrize("width", WIDTHS)
def test_products_equal_float64_at_odd_shapes(
    kernel: str, dtype: torch.dtype, x_dtype: torch.dtype, width: int
) -> None:
    skip_unless_here(kernel, dtype, x_dtype)
    for out in (1, 3, 4, 13):
        weight = sparse(out, width, dtype=dtype, seed=width)
        held = packed(weight)
        for rows in (1, 2, 3, 4, 5, 8):
            x = torch.randn(rows, width).to(x_dtype)
            check(weight, x, matvec(held, x, kernel=kernel))


@pytest.mark.parametrize(
    ("out", "width"), [(1, 17), (13, 200), (37, 2048), (19, 9000), (3, 20000)]
)  # one band of columns, and several
def test_a_token_has_the_same_bits_alone_and_among_others(out: int, width: int, threads: None) -> None:
    held, bias = packed(sparse(out, width, dtype=BF16)), torch.randn(out).to(BF16)
    for kernel in kernels(BF16, BF16):
        for tokens in (4, 5, 7, 8, 13, *((32, 33, 192, 193) if out * width < 10_000 else ())):
            torch.set_num_threads(1 + tokens % 3)
            x = torch.randn(tokens, width).to(BF16)
            alone = torch.cat([matvec(held, token[None], bias, kernel=kernel) for token in x])
            assert torch.equal(matvec(held, x, bias, kernel=kernel), alone), (kernel, tokens)


def test_many_tokens_are_rounded_as_one_is(threads: None) -> None:
    torch.set_num_threads(1)
    bits = [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF]  # NaN, Inf, overflow
    bits += [0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x3F808001, 0x3F807FFF]  # ties, and beside one
    bits += [0x00000001, 0x00008000, 0x00018000, 0x007FFFFF, 0x80000001, 0x807F8000, 0x80000000, 0]  # denormals, -0.0
    bias = torch.from_numpy(np.array(bits * 2, dtype=np.uint32).view(np.float32))
    held, x = packed(sparse(len(bias), 64)), torch.zeros(6, 64, dtype=BF16)
    x[3:] = torch.randn(3, 64).to(BF16)
    alone = torch.cat([matvec(held, token[None], bias) for token in x]).view(torch.int16)
    assert torch.equal(matvec(held, x, bias).view(torch.int16), alone)
    number = ~bias.isnan()
    assert torch.equal(alone[0, number], (bias[number] + 0.0).to(BF16).view(torch.int16))
    assert matvec(held, x, bias)[:, ~number].isnan().all()


@every_kernel
def test_a_bias_of_either_dtype_is_added_before_rounding(kernel: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    skip_unless_here(kernel, dtype, x_dtype)
    weight, x = sparse(10, 70, dtype=dtype), torch.randn(2, 70).to(x_dtype)
    for bias in (torch.randn(10), torch.randn(10).to(BF16)):
        check(weight, x, matvec(packed(weight), x, bias, kernel=kernel), bias)


@every_kernel
def test_empty_full_and_uneven_rows(kernel: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    skip_unless_here(kernel, dtype, x_dtype)
    x = torch.randn(1, 100).to(x_dtype)
    full = torch.randn(9, 100).to(dtype)
    uneven = full.clone()
    uneven[0], uneven[4], uneven[8], uneven[2, 50:] = 0, 0, 0, 0
    for weight in (torch.zeros(9, 100, dtype=dtype), full, uneven):
        check(weight, x, matvec(packed(weight), x, kernel=kernel))
        assert torch.equal(expand(packed(weight), torch.full_like(weight, torch.nan)), weight)


@every_kernel
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:7"])
def test_n_of_m(kernel: str, dtype: torch.dtype, x_dtype: torch.dtype, pattern: str) -> None:
    skip_unless_here(kernel, dtype, x_dtype)
    n, m = map(int, pattern.split(":"))
    weight, x = n_of_m(6, 15 * m, n, m, dtype), torch.randn(3, 15 * m).to(x_dtype)
    check(weight, x, matvec(packed(weight, pattern), x, kernel=kernel))


@every_kernel
def test_infinities_and_nan_meet_zeros_as_in_a_dense_product(
    kernel: str, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    skip_unless_here(kernel, dtype, x_dtype)
    weight = torch.ones(3, 40, dtype=dtype)
    weight[0, 5] = 0
    for special in (torch.inf, -torch.inf, torch.nan):
        x = torch.ones(1, 40, dtype=x_dtype)
        x[0, 5] = special
        assert torch.equal(matvec(packed(weight), x, kernel=kernel).isnan(), linear(x.float(), weight.float()).isnan())
        assert matvec(packed(weight), x, kernel=kernel).isnan()[0, 0]


@every_kernel
def test_the_unpacked_weight_is_equal_to_the_bit(kernel: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    skip_unless_here(kernel, dtype, x_dtype)
    bits = torch.int16 if dtype == BF16 else torch.int32
    for width in WIDTHS:
        weight = sparse(7, width, dtype=dtype)
        weight[weight == 0] = torch.where(torch.rand(int((weight == 0).sum())) < 0.5, 0.0, -0.0).to(dtype)
        out = torch.full_like(weight, torch.nan)
        if kernel in kernels(dtype, dtype):
            assert expand(packed(weight), out, kernel=kernel) is out
            assert torch.equal(out.view(bits), weight.view(bits))


@given(data=st.data())
def test_any_shape_and_any_mask(data: st.DataObject) -> None:
    kernel, dtype, x_dtype = data.draw(st.sampled_from([case for case in KERNELS if case[0] in kernels(*case[1:])]))
    out, width = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 300))
    seed, sparsity = data.draw(st.integers(0, 1000)), data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]))
    weight, x = sparse(out, width, sparsity=sparsity, dtype=dtype, seed=seed), torch.randn(width).to(x_dtype)
    check(weight, x, matvec(packed(weight), x, kernel=kernel))
    assert torch.equal(expand(packed(weight), torch.full_like(weight, torch.nan)), weight)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_as_exact_as_torchs_own_bfloat16(sparsity: float) -> None:
    weight = sparse(256, 4096, sparsity=sparsity) * 0.02
    for rows in (1, 2, 3, 4, 16):
        x = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(rows)).to(BF16)
        wanted = exact(weight, x)
        dense = np.linalg.norm(linear(x, weight).double().numpy() - wanted)
        for kernel in kernels(BF16, BF16):
            ours = matvec(packed(weight), x, kernel=kernel).double().numpy()
            assert np.linalg.norm(ours - wanted) <= 1.2 * dense, kernel


def test_x_may_have_any_leading_dimensions_and_strides() -> None:
    weight, x = sparse(12, 64), torch.randn(2, 2, 64).to(BF16)
    held = packed(weight)
    y = matvec(held, x)
    assert y.shape == (2, 2, 12)
    assert torch.equal(y, matvec(held, x.transpose(0, 1).contiguous().transpose(0, 1)))
    shifted = torch.zeros(257, dtype=BF16)[1:].view(4, 64)  # not aligned
    shifted.copy_(x.view(4, 64))
    assert torch.equal(y.view(4, 12), matvec(held, shifted))


def test_what_does_not_fit_is_refused() -> None:
    held = packed(sparse(12, 64))
    good = torch.zeros(1, 64, dtype=BF16)
    for x in (torch.zeros(1, 63, dtype=BF16), torch.zeros(0, 64, dtype=BF16)):
        with pytest.raises(ValueError, match=r"wanted \(..., 64\) with at least one row"):
            matvec(held, x)
    with pytest.raises(ValueError, match=r"x of bfloat16 or float32, not torch\.float16"):
        matvec(held, good.half())
    for bias in (torch.zeros(11), torch.zeros(12, dtype=torch.float16)):
        with pytest.raises(ValueError, match="wanted \\[12\\]"):
            matvec(held, good, bias)
    with pytest.raises(ValueError, match="on the cpu"):
        matvec(held, good.to("meta"))
    for out in (torch.zeros(12, 64), torch.zeros(64, 12, dtype=BF16).T, torch.zeros(12, 63, dtype=BF16)):
        with pytest.raises(ValueError, match="contiguous"):
            expand(held, out)


def test_the_rows_that_gain_are_those_of_the_fastest_kernel() -> None:
    for dtype, x_dtype in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):
        fastest = next(iter(kernels(dtype, x_dtype)))
        assert (kernel_rows(dtype, x_dtype) == 0) == (fastest == "portable")
        assert rows_beside_copy(dtype, x_dtype) <= kernel_rows(dtype, x_dtype)


def test_where_torch_has_amx_the_rows_are_those_from_before_many_were_measured() -> None:
    for usual, beside_amx, before in (
        (KERNEL_ROWS, BESIDE_AMX, 48),
        (nested.KERNEL_ROWS, nested.BESIDE_AMX, 8),
    ):
        rows = {amx: rows_up_to("avx512-bf16", usual, beside_amx, amx=amx) for amx in (True, False)}
        assert rows == {True: before, False: 192}
        assert rows_up_to("avx2", usual, beside_amx, amx=True) == usual["avx2"]
