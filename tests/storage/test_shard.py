"""Whether a tensor is finite: as torch says it, for every bit pattern, shape and layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmsparse.storage.shard import CHECKED, is_finite

FLOATS = {torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float32: np.uint32, torch.float64: np.uint64}


def floats(patterns: list[int], dtype: torch.dtype) -> Tensor:
    """Numbers of these bit patterns, whatever they are."""
    return torch.from_numpy(np.array(patterns, dtype=FLOATS[dtype]).view(np.uint8).copy()).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits(dtype: torch.dtype) -> None:
    every = floats(list(range(2**16)), dtype)
    assert [is_finite(one) for one in every[::7]] == torch.isfinite(every[::7]).tolist()
    assert is_finite(every[torch.isfinite(every)]) and not is_finite(every)
    for one in every[~torch.isfinite(every)][::5]:
        assert not is_finite(one)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_bits_in_any_layout(dtype: torch.dtype, data: st.DataObject) -> None:
    size = 8 * dtype.itemsize
    ones = (1 << size) - 1
    edges = st.sampled_from([0, 1, 1 << (size - 1), ones, ones >> 1, *(ones << k & ones for k in range(size))])
    pattern = st.one_of(edges, st.integers(0, ones), st.integers(0, 1 << (size - 3)))
    flat = floats(data.draw(st.lists(pattern, min_size=12, max_size=12)), dtype)
    cut = flat.view(2, 6)
    layouts = (flat, flat.view(3, 4).T, cut[:, ::2], flat[3], flat[5:5], cut[:, 1], flat[:1].expand(4, 1), cut.flip(0))
    for tensor in layouts:
        assert is_finite(tensor) == bool(torch.isfinite(tensor).all()), tensor


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, CHECKED - 1, CHECKED, 2 * CHECKED + 6])
def test_one_among_many_is_found(dtype: torch.dtype, bad: float, at: int) -> None:
    tensor = torch.full((2 * CHECKED + 7,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor)
    tensor[at] = bad
    assert not is_finite(tensor)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_what_is_no_float_of_16_bits_and_more_passes(dtype: torch.dtype) -> None:
    assert is_finite(torch.zeros(3, dtype=torch.uint8).repeat(8).view(dtype))


def test_a_gradient_is_no_hindrance() -> None:
    assert is_finite(torch.ones(3, requires_grad=True))
