"""Parts of a packed weight are the packed parts of the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmsparse.formats.bitmask import Bitmask


def weight_of(shape: tuple[int, ...], pattern: str, seed: int = 0) -> Tensor:
    """A random bfloat16 weight of this shape and pattern."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(torch.bfloat16)
    score = torch.rand(shape, generator=generator)
    if pattern == "unstructured":
        return weight.masked_fill(score < 0.7, 0.0)
    least = score.unflatten(-1, (-1, 4)).topk(2, dim=-1).values[..., -1:]
    return weight.masked_fill((score.unflatten(-1, (-1, 4)) < least).flatten(-2), 0.0)


def assert_equal(one: Bitmask, other: Bitmask) -> None:
    assert (one.shape, one.pattern) == (other.shape, other.pattern)
    assert one.tensors().keys() == other.tensors().keys()
    for end, tensor in one.tensors().items():
        assert tensor.dtype == other.tensors()[end].dtype and torch.equal(tensor, other.tensors()[end]), end


@given(
    rows=st.integers(0, 9),
    groups=st.integers(1, 5),
    pattern=st.sampled_from(["unstructured", "2:4"]),
    cut=st.integers(0, 9),
)
def test_rows_are_those_of_the_weight(rows: int, groups: int, pattern: str, cut: int) -> None:
    weight = weight_of((rows, 4 * groups), pattern)
    packed, middle = Bitmask.pack(weight, pattern), min(cut, rows)
    for start, stop in ((0, middle), (middle, rows)):
        assert_equal(packed.rows(start, stop), Bitmask.pack(weight[start:stop], pattern))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_matrices_of_experts_are_its_rows_and_join_to_it(pattern: str) -> None:
    packed = Bitmask.pack(weight_of((3, 5, 12), pattern), pattern)
    assert_equal(Bitmask.joined([packed.rows(5 * expert, 5 * expert + 5) for expert in range(3)]), packed)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_kept_zeros_are_kept_again(pattern: str) -> None:
    weight = weight_of((4, 8), pattern)
    keep = weight != 0
    weight[0] = 0.0  # kept, and zero
    packed = Bitmask.pack(weight, pattern, keep)
    assert_equal(packed.emptied().filled(packed.unpack()), packed)
