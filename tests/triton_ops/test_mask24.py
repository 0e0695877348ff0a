from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triton_ops import reference
from triton_ops.mask24 import mask24

VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0078125, 2.0, -2.0, 3e38, float("inf")])  # many are equal


@given(st.lists(st.tuples(VALUES, VALUES, VALUES, VALUES), min_size=1, max_size=20))
def test_a_mask_is_the_reference(groups: list[tuple[float, ...]]) -> None:
    weight = torch.tensor(groups, dtype=torch.bfloat16)
    assert torch.equal(mask24(weight), reference.mask24(weight))


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=4, max_size=4))
def test_any_four_bit_patterns_keep_two(bits: list[int]) -> None:
    weight = torch.tensor([bits], dtype=torch.int16).view(torch.float16)  # NaNs among them
    assert int(mask24(weight).sum()) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_matrix_that_is_a_view(dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.randn(128, 63, generator=torch.Generator().manual_seed(0)).to(device, dtype).T
    assert torch.equal(mask24(weight), reference.mask24(weight.contiguous()))


def test_rows_that_are_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"K a multiple of 4, got \(2, 6\)"):
        mask24(torch.ones(2, 6))
