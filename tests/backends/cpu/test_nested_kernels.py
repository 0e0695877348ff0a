"""Products with small integers against float64, by every kernel that this CPU has, and the way into memory and back."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmsparse.backends.cpu import nested
from llmsparse.errors import CheckpointError
from llmsparse.formats.digits import Code
from llmsparse.formats.nested import Nested

BF16, FP32 = torch.bfloat16, torch.float32
KERNELS = [  # kernel, dtype that weights are rounded to, dtype that they and x have
    ("avx512-bf16", BF16, BF16),
    ("avx512", BF16, BF16),
    ("avx512", BF16, FP32),
    ("avx512", FP32, FP32),
    ("avx2", BF16, BF16),
    ("avx2", FP32, FP32),
    ("portable", BF16, BF16),
    ("portable", BF16, FP32),
    ("portable", FP32, FP32),
]
every_kernel = pytest.mark.parametrize(
    ("kernel", "stored", "dtype"), KERNELS, ids=lambda value: str(value).removeprefix("torch.")
)


def weight_of(
    *shape: int, stored: torch.dtype = BF16, spread: float = 1.0, group: int | None = None, seed: int = 0
) -> Nested:
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(shape, generator=generator) * spread).round().clamp(-127, 127).to(torch.int8)
    groups = -(-shape[-1] // group) if group else 1
    steps = torch.rand(q.numel() // shape[-1], groups, generator=generator) + 0.01
    return Nested.encode(q, steps.to(BF16), stored)


def held(packed: Nested, dtype: torch.dtype, kernel: str) -> nested.CpuNested:
    made = nested.prepare(replace(packed, dtype=dtype))
    if kernel not in nested.kernels(packed.stored, dtype, made.wide):
        pytest.skip(f"no {kernel} for this weight on this CPU")
    return made


def check(packed: Nested, x: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
    """Half a unit of the last place that y has, and what summing in float32 may lose."""
    weight = packed.unpack().double().numpy()
    wanted = x.double().numpy() @ weight.T + (0 if bias is None else bias.double().numpy())
    magnitude = np.abs(x.double().numpy()) @ np.abs(weight).T + (0 if bias is None else np.abs(bias.double().numpy()))
    rounding = 2**-8 if x.dtype == BF16 else 2**-24
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], weight.shape[0])
    assert np.all(np.abs(y.double().numpy() - wanted) <= rounding * np.abs(wanted) + 1e-6 * magnitude)


@every_kernel
@pytest.mark.parametrize("spread", [0.4, 1.0, 3.0, 40.0])  # two bits, escapes, a list, a mask and int8
def test_products_equal_float64_at_odd_shapes(
    kernel: str, stored: torch.dtype, dtype: torch.dtype, spread: float
) -> None:
    for out, width in ((1, 1), (3, 63), (4, 64), (5, 65), (13, 200)):
        packed = weight_of(out, width, stored=stored, spread=spread, seed=width)
        made = held(packed, dtype, kernel)
        for rows in (1, 2, 3, 4, 5, 8):
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
            check(packed, x, nested.matvec(made, x, kernel=kernel))
        whole = torch.empty(packed.shape, dtype=dtype)
        assert torch.equal(nested.expand(made, whole, kernel=kernel), packed.unpack().to(dtype))
        bias = torch.randn(out).to(dtype)
        check(packed, x, nested.matvec(made, x, bias, kernel=kernel), bias)


@every_kernel
def test_groups_of_columns_have_steps_of_their_own(kernel: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    for spread in (1.0, 40.0):
        packed = weight_of(6, 256, stored=stored, spread=spread, group=64)
        x, made = torch.randn(2, 256).to(dtype), held(packed, dtype, kernel)
        check(packed, x, nested.matvec(made, x, kernel=kernel))
        whole = torch.empty(packed.shape, dtype=dtype)
        assert torch.equal(nested.expand(made, whole, kernel=kernel), packed.unpack().to(dtype))


@pytest.mark.parametrize("spread", [0.4, 1.0, 3.0])
@pytest.mark.parametrize(("out", "width", "group"), [(1, 17, None), (21, 768, 192), (37, 2048, None), (9, 9216, 192)])
def test_a_token_has_the_same_bits_alone_and_among_others(
    out: int, width: int, group: int | None, spread: float, threads: None
) -> None:
    packed, bias = weight_of(out, width, spread=spread, group=group), torch.randn(out).to(BF16)
    made = nested.prepare(packed)
    for kernel in nested.kernels(BF16, BF16, made.wide):
        for tokens in (4, 5, 7, 13, *((32, 33, 192, 193) if out * width < 20_000 else ())):
            torch.set_num_threads(1 + tokens % 3)
            x = torch.randn(tokens, width).to(BF16)
            alone = torch.cat([nested.matvec(made, token[None], bias, kernel=kernel) for token in x])
            assert torch.equal(nested.matvec(made, x, bias, kernel=kernel), alone), (kernel, tokens)


@pytest.mark.parametrize("spread", [1.0, 3.0])  # without a list, and with one
def test_many_tokens_are_rounded_as_one_is(spread: float) -> None:
    packed = weight_of(32, 64, spread=spread)
    x, bias = torch.randn(6, 64).to(BF16), torch.randn(32).to(BF16)
    x[1], x[2, 5], x[3, 5], x[4], x[5] = 3e38, torch.inf, torch.nan, 1e-40, 0  # the first overflows
    bias[:8] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.38e38, -3.38e38, 1e-40, -0.0, 0.0]).to(BF16)
    made = nested.prepare(packed)
    alone = torch.cat([nested.matvec(made, token[None], bias) for token in x])
    y, nan = nested.matvec(made, x, bias), alone.isnan()  # which of two NaN a sum is, nobody says
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(y[~nan].view(torch.int16), alone[~nan].view(torch.int16))
    assert nan.any() and alone.isinf().any()
    ones, tie = torch.ones(32, 1, dtype=torch.int8), torch.full((6, 1), 2**-8, dtype=BF16)
    made, bias = nested.prepare(Nested.encode(ones, torch.ones(32, 1, dtype=BF16), BF16)), torch.ones(32, dtype=BF16)
    bias[1::2] += 2**-7
    assert torch.equal(nested.matvec(made, tie, bias), (tie.float() + bias.float()).to(BF16))


@every_kernel
def test_any_number_of_threads_gives_the_same_bits(
    kernel: str, stored: torch.dtype, dtype: torch.dtype, threads: None
) -> None:
    packed = weight_of(301, 130, stored=stored)
    made, x, seen = held(packed, dtype, kernel), torch.randn(3, 130).to(dtype), list[Tensor]()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        seen.append(nested.matvec(made, x, kernel=kernel))
    assert all(torch.equal(y, seen[0]) for y in seen)


INT8 = [(k, s, d) for k in ("avx512-vnni", "avx2-int8", "portable-int8") for s, d in ((BF16, BF16), (FP32, FP32))]


def by_the_rule(packed: Nested, x: Tensor) -> np.ndarray:
    """Products with x in 8 bits: of spans of 256 columns, 64 where steps have groups, x becomes scale · k; W is not rounded."""
    q, steps = packed.numbers().double().numpy(), packed.steps.double().numpy()
    width = q.shape[1]
    span = 256 if packed.group >= width or packed.group % 256 == 0 else 64
    weight = q * np.repeat(steps, packed.group, axis=1)[:, :width]
    rounded = np.zeros((len(x), width))
    for start in range(0, width, span):
        part = x[:, start : start + span].float().numpy()
        scale = np.abs(part).max(1, keepdims=True) / np.float32(127)
        quotients = part * (np.float32(1) / np.where(scale > 0, scale, np.float32(1)))
        rounded[:, start : start + span] = scale * np.trunc(quotients + np.copysign(np.float32(0.5), quotients))
    return rounded @ weight.T


@pytest.mark.parametrize(("kernel", "stored", "dtype"), INT8, ids=lambda value: str(value).removeprefix("torch."))
def test_activations_of_8_bits_have_a_scale_for_each_span(
    kernel: str, stored: torch.dtype, dtype: torch.dtype, threads: None
) -> None:
    cases = [(1, 1, None), (3, 63, None), (5, 65, None), (13, 700, None), (7, 512, 64), (6, 768, 256)]
    for (out, width, group), spread in product(cases, (0.4, 1.0, 3.0, 40.0)):
        packed = weight_of(out, width, stored=stored, spread=spread, group=group)
        made = nested.prepare(replace(packed, dtype=dtype))
        if kernel not in nested.kernels(stored, dtype, made.wide, True):
            continue
        far = made.list_of[0][1].numel() > 0  # what is listed is added with x as it is
        for rows in (1, 3, 8):
            x, bias = torch.randn(rows, width).to(dtype), torch.randn(out).to(dtype)
            y = nested.matvec(made, x, bias, int8=True, kernel=kernel).double().numpy()
            wanted = by_the_rule(packed, x) + bias.double().numpy()
            magnitude = np.abs(x.double().numpy()) @ np.abs(packed.unpack().double().numpy()).T
            slack = (2**-8 if dtype == BF16 else 1e-6) * np.abs(wanted) + (8e-3 if far else 1e-6) * magnitude
            assert np.all(np.abs(y - wanted) <= slack), (out, width, group, spread, rows)
        torch.set_num_threads(3)
        again = nested.matvec(made, x, bias, int8=True, kernel=kernel)
        assert np.array_equal(again.double().numpy(), y)


def test_for_activations_of_8_bits_a_weight_with_some_large_numbers_is_a_mask_and_int8() -> None:
    packed = weight_of(64, 320, spread=3.3)  # 1.5 % are beyond an escape
    exact, rounded = nested.prepare(packed), nested.prepare(packed, int8=True)
    best = next(iter(nested.kernels(BF16, BF16, False, True)))
    assert not exact.wide and rounded.wide == (best in nested.kernels(BF16, BF16, True, True))
    assert not nested.prepare(weight_of(64, 320, spread=1.5), int8=True).wide
    x = torch.randn(1, 320, generator=torch.Generator().manual_seed(1)).bfloat16()
    close = nested.matvec(exact, x, int8=True).float()
    torch.testing.assert_close(
        nested.matvec(rounded, x, int8=True).float(), close, rtol=2e-2, atol=2e-2 * close.abs().max().item()
    )
    assert torch.equal(rounded.packed().numbers(), packed.numbers())


def test_in_8_bits_what_is_not_finite_makes_the_product_nan() -> None:
    made = nested.prepare(weight_of(5, 70))
    for bad in (torch.inf, torch.nan):
        x = torch.randn(2, 70).to(BF16)
        x[1, 3] = bad
        y = nested.matvec(made, x, int8=True)
        assert y[0].isfinite().all() and y[1].isnan().all()
    assert not nested.matvec(made, torch.zeros(1, 70).to(BF16), int8=True).any()


@given(
    experts=st.integers(0, 2),
    out=st.integers(1, 9),
    width=st.integers(1, 140),
    spread=st.sampled_from([0.0, 0.5, 1.0, 3.0, 50.0]),
    stored=st.sampled_from([BF16, FP32]),
    seed=st.integers(0, 99),
)
def test_unpacked_and_packed_again_it_is_the_same(
    experts: int, out: int, width: int, spread: float, stored: torch.dtype, seed: int
) -> None:
    packed = weight_of(*([experts] if experts else []), out, width, stored=stored, spread=spread, seed=seed)
    assert torch.equal(nested.numbers_of(packed), packed.numbers())
    made = nested.prepare(packed)
    assert torch.equal(nested.expand(made, torch.empty(packed.shape, dtype=stored)), packed.unpack())
    again = made.packed()
    assert again.describe() == packed.describe()
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), packed.tensors().values(), strict=True))


@pytest.mark.parametrize("code", [(1, 1, 1, 1, 8), (2, 1, 3, 8), (3, 2, 8), (1, 8), (8,), (4, 4, 2, 7)])
def test_streams_of_any_code_are_read_as_by_the_format(code: tuple[int, ...]) -> None:
    packed = weight_of(7, 50, spread=4.0)
    fours = frozenset(level for level, width in enumerate(code) if width == 1 and level != 1)
    other = Nested.written(packed.numbers(), packed.steps, Code(code, fours), 3, 50, BF16)
    assert torch.equal(nested.numbers_of(other), packed.numbers())


@given(seed=st.integers(0, 10**6))
def test_a_damaged_stream_is_refused_or_read_within_its_bytes(seed: int) -> None:
    packed, draw = weight_of(7, 50, spread=3.0), np.random.default_rng(seed)
    stream = packed.stream.clone()
    stream[int(draw.integers(len(stream)))] ^= 1 << int(draw.integers(8))
    try:
        q = nested.numbers_of(replace(packed, stream=stream))
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert q.shape == packed.shape


def test_zero_times_infinity_is_as_in_the_dense_product() -> None:
    packed = weight_of(5, 70, spread=3.0)
    x = torch.randn(1, 70).to(BF16)
    x[0, 3] = torch.inf
    want, got = torch.nn.functional.linear(x, packed.unpack()), nested.matvec(nested.prepare(packed), x)
    assert torch.equal(want.isnan(), got.isnan()) and torch.equal(want.isposinf(), got.isposinf())


def test_a_copy_has_memory_of_its_own_and_what_does_not_fit_is_refused() -> None:
    packed = weight_of(5, 70)
    made, x = nested.prepare(packed), torch.randn(2, 70).to(BF16)
    assert torch.equal(nested.matvec(copy.deepcopy(made), x), nested.matvec(made, x))
    large = weight_of(64, 1024)
    assert 8 * nested.prepare(large).nbytes / large.numbers().numel() < 3.0, (
        "2 bits, 4 for each escape, and little beside"
    )
    for wrong in (torch.randn(2, 71).to(BF16), torch.randn(2, 70)):
        with pytest.raises(ValueError, match="wanted"):
            nested.matvec(made, wrong)
