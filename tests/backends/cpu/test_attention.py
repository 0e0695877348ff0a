"""Attention against float64, by every kernel that this CPU has, whatever is masked and however keys lie in memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmsparse.backends.cpu.attention import attention, kernels
from llmsparse.errors import RecipeError

BF16, FP32 = torch.bfloat16, torch.float32
KERNELS = [(name, dtype) for name in ("avx512", "avx2", "portable") for dtype in (BF16, FP32)]
every_kernel = pytest.mark.parametrize(
    ("kernel", "dtype"), KERNELS, ids=lambda value: str(value).removeprefix("torch.")
)


def tensors(
    batch: int,
    heads: int,
    shared: int,
    queries: int,
    keys: int,
    width: int,
    values: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads * shared, queries, width), (batch, heads, keys, width), (batch, heads, keys, values)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def wanted(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float) -> np.ndarray:
    """softmax(scale · q kᵀ + added) v in float64, (batch, queries, heads, width); zeros where nothing is looked at."""
    repeat = q.shape[1] // k.shape[1]
    a, b, c = (one.double().numpy() for one in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
    scores = scale * a @ b.swapaxes(-1, -2) + (0 if added is None else added.double().numpy())
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(most), 0, most))
    total = weights.sum(-1, keepdims=True)
    return (weights / np.where(total == 0, 1, total) @ c).swapaxes(1, 2)


def check(y: Tensor, right: np.ndarray, v: Tensor) -> None:
    rounding = 2**-8 if y.dtype == BF16 else 2**-23
    assert y.shape == right.shape and y.dtype == v.dtype and y.is_contiguous()
    bound = rounding * np.abs(right) + 2e-6 * v.abs().double().max().item()
    assert np.all(np.abs(y.double().numpy() - right) <= bound)


def skip_unless_here(kernel: str, dtype: torch.dtype) -> None:
    if kernel not in kernels(dtype):
        pytest.skip(f"this CPU cannot run {kernel}")


SIZES = {
    "batch": st.integers(1, 3),
    "heads": st.integers(1, 3),
    "shared": st.integers(1, 5),
    "queries": st.integers(1, 8),
    "keys": st.integers(1, 40),
    "width": st.sampled_from((1, 8, 16, 17, 64, 80, 128)),
    "values": st.sampled_from((1, 8, 64, 65, 96)),
}


@every_kernel
@given(st.fixed_dictionaries(SIZES), st.sampled_from((None, "bool", "added")), st.integers(0, 9))
def test_it_is_what_attention_is(
    kernel: str, dtype: torch.dtype, sizes: dict[str, int], masked: str | None, seed: int
) -> None:
    skip_unless_here(kernel, dtype)
    q, k, v = tensors(**sizes, dtype=dtype, seed=seed)
    scale, mask, added = 1 / math.sqrt(sizes["width"]), None, None
    chance = torch.Generator().manual_seed(seed)
    look = torch.rand(sizes["batch"], 1, sizes["queries"], sizes["keys"], generator=chance) > 0.3
    if masked == "bool":
        mask, added = look, torch.zeros(look.shape).masked_fill_(~look, -torch.inf)
    elif masked == "added":
        mask = added = torch.randn(look.shape).masked_fill_(~look, torch.finfo(dtype).min).to(dtype)
        added = added.masked_fill(added < -1e30, -torch.inf) if bool(look.any(-1).all()) else added
    check(attention(q, k, v, mask, scale, kernel=kernel), wanted(q, k, v, added, scale), v)


@every_kernel
def test_large_scores_do_not_overflow_and_keys_far_below_add_nothing(kernel: str, dtype: torch.dtype) -> None:
    skip_unless_here(kernel, dtype)
    q, k, v = tensors(1, 1, 1, 1, 40, 64, 64, dtype)
    check(attention(q * 100, k * 100, v, None, 1.0, kernel=kernel), wanted(q * 100, k * 100, v, None, 1.0), v)


@every_kernel
def test_a_head_gives_the_same_bits_alone_and_in_a_batch_on_any_number_of_threads(
    kernel: str, dtype: torch.dtype, threads: None
) -> None:
    skip_unless_here(kernel, dtype)
    q, k, v = tensors(3, 2, 4, 2, 37, 64, 64, dtype)
    look = torch.rand(3, 1, 2, 37) > 0.2
    torch.set_num_threads(1)
    alone = torch.cat(
        [attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], look[b : b + 1], 0.1, kernel=kernel) for b in range(3)]
    )
    for number in (1, 2, 5, 40):
        torch.set_num_threads(number)
        assert torch.equal(attention(q, k, v, look, 0.1, kernel=kernel), alone)


def test_keys_are_read_where_they_lie() -> None:
    q, k, v = tensors(2, 2, 2, 1, 9, 32, 32, FP32)
    room, turned = torch.full((2, 2, 50, 32), torch.nan), v.transpose(1, 2).contiguous().transpose(1, 2)
    room[:, :, :9] = k
    assert torch.equal(attention(q, room[:, :, :9], turned, None, 0.2), attention(q, k, v, None, 0.2))
    every_second = torch.zeros(2, 2, 9, 64)
    every_second[..., ::2] = k
    assert torch.equal(attention(q, every_second[..., ::2], v, None, 0.2), attention(q, k, v, None, 0.2))


def test_a_number_that_is_none_stays_in_its_own_head() -> None:
    q, k, v = tensors(1, 2, 1, 1, 20, 32, 32, BF16)
    v[0, 1, 3, 5] = torch.nan
    y = attention(q, k, v, None, 0.2)
    assert y[0, 0, 1].isnan().tolist() == [column == 5 for column in range(32)] and not y[0, 0, 0].isnan().any()


def test_nothing_to_do_gives_nothing() -> None:
    q, k, v = tensors(1, 2, 1, 1, 3, 8, 8, FP32)
    assert attention(q[:, :, :0], k, v, None, 1.0).shape == (1, 0, 2, 8)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = tensors(1, 2, 2, 1, 3, 8, 8, FP32)
    for bad in (
        (q[:, :3], k, v),
        (q, k[:, :, :0], v[:, :, :0]),
        (q, k[..., :4], v),
        (q, k.bfloat16(), v),
        (q, k, v[:, :1]),
    ):
        with pytest.raises(ValueError, match="wanted"):
            attention(*bad, None, 1.0)
    with pytest.raises(ValueError, match="mask is"):
        attention(q, k, v, torch.ones(1, 1, 1, 3, dtype=torch.int64), 1.0)
    with pytest.raises(RecipeError, match="bfloat16 or float32"):
        kernels(torch.float16)
