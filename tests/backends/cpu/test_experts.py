"""Experts that a few tokens chose, and gated layers, against float64, by every kernel that this CPU has."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, silu

from llmsparse.backends.cpu.experts import experts, gated, kernels
from llmsparse.errors import RecipeError

BF16, FP32 = torch.bfloat16, torch.float32
KERNELS = [("avx512-bf16", BF16), *product(("avx512", "avx2", "portable"), (BF16, FP32))]
BOUND = {BF16: 5e-3, FP32: 2e-6}  # of norms; a rounding to bf16 is 0.0017, and there are two
Mixture = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
every_kernel = pytest.mark.parametrize(
    ("kernel", "dtype"), KERNELS, ids=lambda value: str(value).removeprefix("torch.")
)


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest) -> None:
    """Kernels that this CPU lacks are skipped."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if "kernel" in params and params["kernel"] not in kernels(params["dtype"]):
        pytest.skip(f"this CPU cannot run {params['kernel']}")


def mixture(tokens: int, k: int, count: int, width: int, inner: int, dtype: torch.dtype, seed: int = 0) -> Mixture:
    """x, gate_up, down, index, shares: experts drawn with replacement, so that a token may choose one twice."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    index = torch.randint(count, (tokens, k), generator=generator)
    weights = draw(count, 2 * inner, width) / width**0.5, draw(count, width, inner) / inner**0.5
    return draw(tokens, width), *weights, index, torch.rand(tokens, k, generator=generator)


def exact(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    """In float64, token by token."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, j in product(range(len(x)), range(index.shape[1])):
        expert = int(index[t, j])
        if 0 <= expert < len(down):
            gate, up = linear(x[t].double(), gate_up[expert].double()).chunk(2)
            y[t] += shares[t, j].double() * linear(silu(gate) * up, down[expert].double())
    return y


def check(y: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert y.shape == wanted.shape and y.dtype == dtype
    assert (y.double() - wanted).norm() <= BOUND[dtype] * wanted.norm()


@every_kernel
@pytest.mark.parametrize("inner", [1, 3, 4, 13, 352])
@pytest.mark.parametrize("width", [1, 7, 31, 32, 33, 100, 128, 4 * 32 + 65])
def test_equals_float64_at_odd_shapes(kernel: str, dtype: torch.dtype, width: int, inner: int) -> None:
    cases = [mixture(tokens, 2, 5, width, inner, dtype, seed=seed) for tokens in (1, 2, 5) for seed in range(3)]
    y = torch.cat([experts(*given, kernel=kernel) for given in cases])
    check(y, torch.cat([exact(*given) for given in cases]), dtype)  # together: terms of a single one may cancel


@every_kernel
def test_equals_float64_for_any_number_of_tokens_and_choices(kernel: str, dtype: torch.dtype) -> None:
    for tokens, k in product(range(1, 10), (1, 2, 3, 4)):
        given = mixture(tokens, k, 4, 40, 24, dtype, seed=tokens)
        check(experts(*given, kernel=kernel), exact(*given), dtype)


@every_kernel
def test_an_index_that_is_no_expert_adds_nothing(kernel: str, dtype: torch.dtype) -> None:
    x, gate_up, down, index, shares = mixture(3, 3, 4, 40, 24, dtype)
    index[0, 1], index[1, 0], index[1, 2], index[2] = 4, -1, 2**40, 9
    y = experts(x, gate_up, down, index, shares, kernel=kernel)
    check(y, exact(x, gate_up, down, index, shares), dtype)
    assert (y[2] == 0).all()


@every_kernel
def test_experts_that_nobody_chose_are_not_read(kernel: str, dtype: torch.dtype) -> None:
    x, gate_up, down, index, shares = mixture(4, 2, 6, 40, 24, dtype)
    index.clamp_(max=2)
    wanted = experts(x, gate_up, down, index, shares, kernel=kernel)
    gate_up[3:], down[3:] = torch.nan, torch.nan
    assert torch.equal(experts(x, gate_up, down, index, shares, kernel=kernel), wanted)


@every_kernel
def test_all_tokens_on_one_expert(kernel: str, dtype: torch.dtype) -> None:
    x, gate_up, down, index, shares = mixture(9, 2, 3, 70, 50, dtype)
    index[:] = 1
    check(experts(x, gate_up, down, index, shares, kernel=kernel), exact(x, gate_up, down, index, shares), dtype)


@every_kernel
def test_a_token_gets_the_same_bits_whoever_is_beside_it(kernel: str, dtype: torch.dtype) -> None:
    x, gate_up, down, index, shares = mixture(8, 2, 4, 70, 50, dtype)
    together = experts(x, gate_up, down, index, shares, kernel=kernel)
    for t in range(8):
        alone = experts(x[t : t + 1], gate_up, down, index[t : t + 1], shares[t : t + 1], kernel=kernel)
        assert torch.equal(alone[0], together[t])


@every_kernel
def test_infinities_and_nan_come_through(kernel: str, dtype: torch.dtype) -> None:
    x, gate_up, down, index, shares = mixture(3, 1, 2, 40, 24, dtype)
    x[1, 7], x[2, 7] = torch.nan, torch.inf
    y, wanted = experts(x, gate_up, down, index, shares, kernel=kernel), exact(x, gate_up, down, index, shares)
    assert y[0].isfinite().all() and y[1].isnan().all()
    assert not y[2].isfinite().any() and not wanted[2].isfinite().any()


@every_kernel
def test_silu_is_exact_over_its_range(kernel: str, dtype: torch.dtype) -> None:
    gates = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e-30, 3e38, -3e38]))).to(dtype)
    inner = len(gates)
    gate, up = gates[:, None], torch.ones(inner, 1, dtype=dtype)
    down = torch.zeros(1, inner, dtype=dtype)
    for at in (0, 1000, 1990, 2000, 2010, 3000, inner - 5, inner - 3, inner - 2, inner - 1):
        down.zero_()[0, at] = 1
        y = gated(torch.ones(1, 1, dtype=dtype), gate, up, down, kernel=kernel)
        wanted = silu(gates[at].double())
        assert (y.double() - wanted).abs() <= 2 * torch.finfo(dtype).eps * wanted.abs() + 1e-37, gates[at]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_as_exact_as_torchs_own_products(dtype: torch.dtype) -> None:
    given = mixture(4, 2, 6, 1024, 352, dtype)
    x, gate_up, down, index, shares = given
    torchs = torch.zeros_like(x, dtype=FP32)
    for t, j in product(range(4), range(2)):
        gate, up = linear(x[t], gate_up[index[t, j]]).chunk(2)
        torchs[t] += shares[t, j] * linear(silu(gate) * up, down[index[t, j]])
    wanted = exact(*given)
    error = (torchs.to(dtype).double() - wanted).norm()
    for kernel in kernels(dtype):
        assert (experts(*given, kernel=kernel).double() - wanted).norm() <= 1.2 * error, kernel


@every_kernel
def test_a_gated_layer(kernel: str, dtype: torch.dtype) -> None:
    for tokens, width, inner in ((1, 33, 70), (5, 64, 3), (9, 7, 200)):
        x, gate_up, down, index, shares = mixture(tokens, 1, 1, width, inner, dtype)
        y = gated(x, gate_up[0, :inner], gate_up[0, inner:], down[0], kernel=kernel)
        check(y, exact(x, gate_up, down, index, torch.ones_like(shares)), dtype)
        split = gated(x.view(1, tokens, 1, width), gate_up[0, :inner], gate_up[0, inner:], down[0], kernel=kernel)
        assert torch.equal(split, y.view(1, tokens, 1, width))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_result_does_not_depend_on_the_number_of_threads(dtype: torch.dtype, threads: None) -> None:
    given = mixture(5, 2, 4, 67, 50, dtype)
    torch.set_num_threads(1)
    wanted = {name: experts(*given, kernel=name) for name in kernels(dtype)}
    for number in (2, 3, 40):
        torch.set_num_threads(number)
        for name, y in wanted.items():
            assert torch.equal(experts(*given, kernel=name), y), (name, number)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_any_strides_and_addresses(dtype: torch.dtype) -> None:
    x, gate_up, down, index, shares = mixture(3, 2, 4, 64, 48, dtype)
    wanted = experts(x, gate_up, down, index, shares)
    turned = [tensor.mT.contiguous().mT for tensor in (x, gate_up, down, index, shares)]
    shifted = torch.zeros(1 + x.numel(), dtype=dtype)[1:].view(x.shape).copy_(x)
    assert torch.equal(experts(*turned), wanted)
    assert torch.equal(experts(shifted, gate_up, down, index.int(), shares.to(torch.float64)), wanted)


def test_no_tokens_and_no_choices() -> None:
    x, gate_up, down, index, shares = mixture(2, 2, 4, 64, 48, FP32)
    assert experts(x[:0], gate_up, down, index[:0], shares[:0]).shape == (0, 64)
    assert (experts(x, gate_up, down, index[:, :0], shares[:, :0]) == 0).all()


@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    kernel, dtype = data.draw(st.sampled_from([case for case in KERNELS if case[0] in kernels(case[1])]))
    tokens, k, count = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    width, inner, seed = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 90)), data.draw(st.integers(0, 99))
    given = mixture(tokens, k, count, width, inner, dtype, seed)
    x, gate_up, down, index, shares = given
    y, wanted = experts(*given, kernel=kernel).double(), exact(*given)
    terms = exact(x.abs(), gate_up.abs(), down.abs(), index, shares)  # where they cancel, the error is theirs
    assert ((y - wanted).abs() <= BOUND[dtype] * (wanted.abs() + 2 * terms)).all()


def test_what_does_not_fit_is_refused() -> None:
    x, gate_up, down, index, shares = mixture(2, 2, 4, 64, 48, BF16)
    with pytest.raises(RecipeError, match=r"bfloat16 or float32, not torch\.float16"):
        experts(x.half(), gate_up.half(), down.half(), index, shares)
    with pytest.raises(ValueError, match=r"wanted \[E, 2n, d\] and \[E, d, n\]"):
        experts(x, gate_up, down[:, :-1], index, shares)
    with pytest.raises(ValueError, match=r"wanted \[tokens, 64\], \[tokens, k\] and \[tokens, k\]"):
        experts(x, gate_up, down, index[:1], shares)
    with pytest.raises(ValueError, match=r"x is torch\.float32, the weights are torch\.bfloat16"):
        experts(x.float(), gate_up, down, index, shares)
    with pytest.raises(ValueError, match="on the cpu"):
        experts(x.to("meta"), gate_up, down, index, shares)
    with pytest.raises(ValueError, match="they do not fit"):
        gated(x, gate_up[0, :48], gate_up[0, 48:], down[0, :, :-1])
