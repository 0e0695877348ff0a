"""The bitmask layout holds every bit of a weight, whatever its shape, and refuses tensors that disagree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from triton_ops import bitmask, bitmask_layout, reference


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(bitmask_layout.BITS[tensor.element_size()])


def random_weight(n: int, k: int, dtype: torch.dtype, sparsity: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    return torch.where(torch.rand(n, k, generator=generator) < sparsity, torch.zeros((), dtype=dtype), weight)


def test_bits_values_and_starts_by_hand() -> None:
    weight = torch.zeros(2, 260, dtype=torch.float16)
    weight[0, [0, 31, 33, 259]] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float16)
    weight[1, 256] = 5.0
    made = bitmask.prepare(weight)
    assert made.values.tolist() == [1, 2, 3, 4, 5]
    assert made.words[0].tolist() == [1 - 2**31, 2, *[0] * 6, 1 << 3, *[0] * 7]
    assert made.words[1].tolist() == [*[0] * 8, 1, *[0] * 7]
    assert made.starts.tolist() == [[0, 3], [4, 4]] and made.starts.dtype == torch.int32


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 63), (5, 100), (4, 257), (2, 512)])
def test_equals_the_reference(n: int, k: int) -> None:
    weight = random_weight(n, k, torch.bfloat16, 0.6)
    values, words, starts = reference.bitmask(weight, reference.stored(weight))
    made = bitmask.prepare(weight)
    assert torch.equal(made.values, values) and torch.equal(made.words, words)
    assert torch.equal(made.starts.long(), starts)


@given(
    n=st.integers(0, 9),
    k=st.integers(0, 530),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    sparsity=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 99),
)
def test_round_trip_keeps_every_bit(n: int, k: int, dtype: torch.dtype, sparsity: float, seed: int) -> None:
    weight = random_weight(n, k, dtype, sparsity, seed)
    if weight.numel():
        weight.view(-1)[seed % weight.numel()] = -0.0
        weight.view(-1)[0] = torch.nan
    made = bitmask.prepare(weight)
    assert torch.equal(bits(bitmask.restore(made)), bits(weight))
    assert torch.equal(bitmask.keep(made), bits(weight) != 0)
    mask = torch.from_numpy(np.packbits(bitmask.keep(made).numpy(), axis=1, bitorder="little"))
    again = bitmask.from_neutral(made.values, mask, None, made.shape)
    assert torch.equal(again.words, made.words) and torch.equal(again.starts, made.starts)


def test_rows_are_expanded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmask_layout, "BLOCK", 200)  # 2 rows of 100
    weight = random_weight(7, 100, torch.float16, 0.5)
    made = bitmask.prepare(weight)
    assert torch.equal(bitmask.restore(made), weight) and torch.equal(bitmask.keep(made), weight != 0)


def test_a_kept_zero_stays_kept() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float16)
    keep = torch.tensor([[True, True, False]])
    made = bitmask.prepare(weight, keep)
    assert made.values.tolist() == [0, 1] and torch.equal(bitmask.keep(made), keep)


def test_values_are_shared_with_the_checkpoint() -> None:
    weight = random_weight(4, 64, torch.bfloat16, 0.5)
    mask = torch.from_numpy(np.packbits((weight != 0).numpy(), axis=1, bitorder="little"))
    values = weight[weight != 0]
    assert bitmask.from_neutral(values, mask, None, (4, 64)).values.data_ptr() == values.data_ptr()


def test_size_is_what_the_layout_says() -> None:
    made = bitmask.prepare(random_weight(64, 1024, torch.bfloat16, 0.7))
    bits_a_weight = 8 * made.nbytes / (64 * 1024)
    assert bits_a_weight == pytest.approx(16 * made.values.numel() / (64 * 1024) + 1 + 1 / 8)


def test_what_disagrees_is_refused() -> None:
    values, mask = torch.ones(3), torch.tensor([[0b101], [0b001]], dtype=torch.uint8)
    offsets = torch.tensor([0, 2, 3])
    assert bitmask.from_neutral(values, mask, offsets, (2, 3)).starts.tolist() == [[0], [2]]
    with pytest.raises(ValueError, match="mask keeps 3 weights, values holds 2"):
        bitmask.from_neutral(values[:2], mask, offsets, (2, 3))
    with pytest.raises(ValueError, match="mask and offsets disagree"):
        bitmask.from_neutral(values, mask, torch.tensor([0, 1, 3]), (2, 3))
    with pytest.raises(ValueError, match="bits beyond column 1"):
        bitmask.from_neutral(values, mask, offsets, (2, 2))
    with pytest.raises(ValueError, match=r"wanted uint8 \[2, 2\]"):
        bitmask.from_neutral(values, mask, offsets, (2, 9))
    with pytest.raises(ValueError, match="keep leaves out a weight"):
        bitmask.prepare(torch.ones(1, 2), torch.tensor([[True, False]]))
