"""Repacking for the kernels and back, and what is refused before a kernel sees it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_weights import n_of_m, sparse

from llmsparse.backends.cpu import expand, matvec, prepare
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.formats.bitmask import Bitmask

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def assert_same(left: Bitmask, right: Bitmask) -> None:
    assert (left.shape, left.pattern) == (right.shape, right.pattern)
    assert left.tensors().keys() == right.tensors().keys()
    for suffix, tensor in left.tensors().items():
        other = right.tensors()[suffix]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        bits = BITS.get(tensor.dtype, tensor.dtype)
        assert torch.equal(tensor.view(bits), other.view(bits))


@given(
    lead=st.sampled_from([(), (1,), (3,), (2, 2)]),
    out=st.integers(1, 11),
    width=st.integers(1, 150),
    sparsity=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    dtype=st.sampled_from(list(BITS)),
)
def test_packed_gives_back_what_was_prepared(
    lead: tuple[int, ...], out: int, width: int, sparsity: float, dtype: torch.dtype
) -> None:
    weight = sparse(*lead, out, width, sparsity=sparsity, dtype=dtype)
    weight[..., 0] = -0.0
    packed = Bitmask.pack(weight)
    assert_same(prepare(packed).packed(), packed)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "5:7"])
def test_packed_gives_back_n_of_m(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    packed = Bitmask.pack(n_of_m(10, 6 * m, n, m), pattern)
    assert_same(prepare(packed).packed(), packed)


def test_takes_the_memory_of_the_packed_weight() -> None:
    packed = Bitmask.pack(sparse(512, 1024))
    assert prepare(packed).nbytes <= sum(tensor.nbytes for tensor in packed.tensors().values())


def test_experts_are_parts_of_one_weight() -> None:
    weight = sparse(3, 10, 70)
    held = prepare(Bitmask.pack(weight))
    assert torch.equal(expand(held, torch.empty_like(weight)), weight)
    x = torch.randn(2, 70).to(torch.bfloat16)
    for index in range(3):
        part = held.part(index)
        alone = Bitmask.pack(weight[index])
        assert_same(part.packed(), alone)
        assert part.values.untyped_storage().data_ptr() == held.values.untyped_storage().data_ptr()
        assert torch.equal(matvec(part, x), matvec(prepare(alone), x))


def test_a_copy_stands_on_its_own() -> None:
    weight = sparse(5, 40)
    held = prepare(Bitmask.pack(weight))
    x = torch.randn(1, 40).to(torch.bfloat16)
    before = matvec(held, x)
    twin = copy.deepcopy(held)
    held.values.zero_()
    assert torch.equal(matvec(twin, x), before)
    assert torch.equal(expand(twin, torch.empty_like(weight)), weight)


def test_the_packed_weight_may_change_afterwards() -> None:
    weight = sparse(5, 40)
    packed = Bitmask.pack(weight)
    held = prepare(packed)
    packed.values.fill_(torch.nan)
    assert torch.equal(expand(held, torch.empty_like(weight)), weight)


def damaged(**changes: Any) -> Bitmask:
    return replace(Bitmask.pack(sparse(6, 45)), **changes)


def offsets_with(index: int, value: int, dtype: torch.dtype = torch.int32) -> Bitmask:
    packed = damaged()
    assert packed.offsets is not None
    offsets = packed.offsets.to(dtype)
    offsets[index] = value
    return replace(packed, offsets=offsets)


def mask_with(row: int, byte: int, flip: int) -> Bitmask:
    packed = damaged()
    packed.mask[row, byte] ^= flip
    return packed


DAMAGED = {
    "a bit more": mask_with(3, 2, 1 << 4),
    "a bit more in the last row": mask_with(5, 0, 1),
    "a bit behind the last column": mask_with(2, 5, 1 << 7),
    "offsets that do not begin at 0": offsets_with(0, 1),
    "an offset below 0": offsets_with(2, -5),
    "an offset behind the values": offsets_with(3, 10**9),
    "an offset that overflows": offsets_with(3, 2**62, torch.int64),
    "an offset that falls": offsets_with(4, 1),
    "values cut short": damaged(values=damaged().values[:-3]),
    "values too many": damaged(values=torch.cat((damaged().values, torch.ones(1, dtype=torch.bfloat16)))),
    "a mask cut short": damaged(mask=damaged().mask[:-1]),
    "a mask of another dtype": damaged(mask=damaged().mask.to(torch.int16)),
    "offsets cut short": damaged(offsets=torch.zeros(3, dtype=torch.int32)),
    "another shape": damaged(shape=(6, 60)),
    "2:4 that is not": Bitmask(
        torch.ones(4, 8), torch.full((4, 2), 0b1110111, dtype=torch.uint8), None, (4, 16), "2:4"
    ),
}


@pytest.mark.parametrize("packed", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_weight_never_reaches_a_kernel(packed: Bitmask) -> None:
    with pytest.raises(CheckpointError, match=r"disagree at row \d+; pack the checkpoint again") as caught:
        prepare(packed)
    assert "\n" not in str(caught.value)


def test_other_dtypes_and_devices_are_refused() -> None:
    for weight in (sparse(4, 8, dtype=torch.float16), sparse(4, 8, dtype=torch.float64)):
        with pytest.raises(RecipeError, match="use backend dense"):
            prepare(Bitmask.pack(weight))
    packed = Bitmask.pack(sparse(4, 8))
    with pytest.raises(RecipeError, match="on cpu and meta"):
        prepare(replace(packed, mask=packed.mask.to("meta")))
