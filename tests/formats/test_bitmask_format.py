"""The bitmask format stores what its page says, and gives every weight back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmsparse.errors import CheckpointError, PatternError
from llmsparse.formats import bitmask, layout, stored_bytes
from llmsparse.formats.bitmask import BITS, Bitmask, describe_unpacked

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    kind = BITS[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Any shape, any dtype, any bits: NaN with payload, -0.0 and subnormals among them."""
    shape = [*draw(st.lists(st.integers(0, 5), max_size=1)), draw(st.integers(0, 6)), draw(st.integers(1, 41))]
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    kept = torch.rand(shape, generator=generator) >= draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    return (raw * kept.unsqueeze(-1)).view(dtype).squeeze(-1)


def test_a_row_worked_by_hand() -> None:
    weight = torch.tensor([[0, 5, 0, -0.0, 0, 0, 0, 7, 9, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    packed = Bitmask.pack(weight)
    assert packed.values.tolist() == [5, -0.0, 7, 9] and packed.values[1].signbit()
    assert packed.mask.tolist() == [[0b10001010, 0b01], [0, 0]]
    assert packed.offsets is not None and packed.offsets.tolist() == [0, 4, 4] and packed.offsets.dtype == torch.int32
    assert packed.describe() == {"shape": [2, 10], "dtype": "float32", "nnz": 4, "pattern": "unstructured"}


def test_a_group_with_fewer_survivors_keeps_its_lowest_free_places() -> None:
    packed = Bitmask.pack(torch.tensor([[0.0, 0, 0, 3, 1, 2, 0, 0, 0, 0, 0, 0]]), "2:4")
    assert packed.mask.tolist() == [[0b00111001, 0b0011]]
    assert packed.values.tolist() == [[0, 3, 1, 2, 0, 0]] and packed.offsets is None


@given(weights())
def test_unpack_gives_back_every_bit(weight: Tensor) -> None:
    packed = Bitmask.pack(weight)
    assert equal_bits(packed.unpack(), weight)
    again = Bitmask.restore("w", packed.describe(), packed.tensors())
    assert equal_bits(again.unpack(), weight)
    sizes = {suffix: (tuple(t.shape), t.dtype) for suffix, t in packed.tensors().items()}
    assert sizes == layout(packed.describe())
    assert sum(tensor.nbytes for tensor in packed.tensors().values()) == stored_bytes(packed.describe())


@given(weights(), st.sampled_from(["1:4", "2:4", "4:8", "3:6", "2:3"]))
def test_n_of_m_gives_back_every_bit(weight: Tensor, pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    width = weight.shape[-1] // m * m or m
    weight = torch.nn.functional.pad(weight.view(BITS[weight.element_size()]), (0, m))[..., :width].contiguous()
    weight.unflatten(-1, (-1, m))[..., n:] = 0
    weight = weight.view(
        {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[weight.itemsize]
    )
    packed = Bitmask.restore("w", Bitmask.pack(weight, pattern).describe(), Bitmask.pack(weight, pattern).tensors())
    assert equal_bits(packed.unpack(), weight)
    assert (packed.keep().reshape(-1, m).sum(-1) == n).all()


def test_rows_that_do_not_fit_into_a_chunk_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.rand(37, 24) * (torch.rand(37, 24) < 0.3)
    whole, measured = Bitmask.pack(weight), describe_unpacked(weight)
    monkeypatch.setattr(bitmask, "CHUNK", 100)
    parts = Bitmask.pack(weight)
    assert all(torch.equal(parts.tensors()[suffix], tensor) for suffix, tensor in whole.tensors().items())
    assert describe_unpacked(weight) == measured == whole.describe()
    weight[30, :8] = 1
    with pytest.raises(PatternError, match="row 30 keeps more than 2 of 4"):
        Bitmask.pack(weight * (torch.arange(24) % 4 < 2) + weight * (torch.arange(37) == 30)[:, None], "2:4")


def test_a_keep_mask_keeps_zeros_and_may_not_lose_values() -> None:
    weight, keep = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[True, True, False]])
    packed = Bitmask.pack(weight, keep=keep)
    assert packed.values.tolist() == [0, 1] and torch.equal(packed.keep(), keep)
    with pytest.raises(PatternError, match="leaves out a weight"):
        Bitmask.pack(weight, keep=~keep)


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([[1, 0, 0, 4], [0, 6, 0, 8]], "2:4"),
        ([[1, 0, 0, 0], [0, 6, 0, 0]], "1:4"),
        ([[1, 0, 0, 0, 0, 0, 0, 0]], "1:8"),
        ([[1, 1, 0, 0, 0, 0, 0, 0]], "2:8"),
        ([[1, 0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]], "4:8"),
        ([[1, 1, 1, 1, 1, 0, 0, 0]], "unstructured"),
        ([[1, 0, -0.0, 0, 1, 1, 0, 0]], "2:4"),  # -0.0 is kept
        ([[1, 0, 0, 4, 0]], "unstructured"),
        ([[1, 0, 0, 4, 0, 0, 1, 1, 0, 1, 1, 1]], "unstructured"),
    ],
)
def test_the_narrowest_pattern_is_measured(rows: list[list[float]], pattern: str) -> None:
    weight = torch.tensor(rows, dtype=torch.bfloat16)
    described = describe_unpacked(weight)
    assert described["pattern"] == pattern
    assert described == Bitmask.pack(weight, pattern).describe()


def flip(tensor: Tensor, place: int, bit: int = 0) -> Tensor:
    damaged = tensor.clone()
    damaged.view(torch.uint8).view(-1)[place] ^= 1 << bit
    return damaged


@given(st.sampled_from(["unstructured", "2:4", "4:8"]), st.data())
def test_any_bit_flipped_in_mask_or_offsets_is_found(pattern: str, data: st.DataObject) -> None:
    weight = torch.arange(1, 121.0).view(5, 24) * (torch.arange(24) % 4 < 2)
    packed = Bitmask.pack(weight, pattern)
    suffix = data.draw(st.sampled_from([suffix for suffix in packed.tensors() if suffix]))
    tensor = packed.tensors()[suffix]
    damaged = flip(tensor, data.draw(st.integers(0, tensor.nbytes - 1)), data.draw(st.integers(0, 7)))
    with pytest.raises(CheckpointError, match=r"^model\.w: .*; the packed file is damaged"):
        Bitmask.restore("model.w", packed.describe(), packed.tensors() | {suffix: damaged})


def test_a_bit_beyond_the_last_column_is_found() -> None:
    packed = Bitmask.pack(torch.ones(2, 12))
    with pytest.raises(CheckpointError, match="beyond the last column"):
        Bitmask.restore("w", packed.describe(), packed.tensors() | {"_mask": flip(packed.mask, 3, 4)})


def test_offsets_that_point_outside_are_never_followed() -> None:
    packed = Bitmask.pack(torch.ones(3, 8))
    for offsets in ([0, 8, 2**31 - 1, 24], [0, -8, 16, 24], [8, 16, 24, 24]):
        damaged = packed.tensors() | {"_offsets": torch.tensor(offsets, dtype=torch.int32)}
        with pytest.raises(CheckpointError, match="mask and offsets disagree"):
            Bitmask.restore("w", packed.describe(), damaged)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shape": [2, 9]}, "wanted"),
        ({"shape": [8]}, "wanted two or more sizes"),
        ({"shape": [-2, 8]}, "wanted two or more sizes"),
        ({"shape": "8"}, "wanted two or more sizes"),
        ({"nnz": 1.5}, "wanted two or more sizes"),
        ({"nnz": 7}, "values is"),
        ({"dtype": "float16"}, "values is"),
        ({"dtype": "complex128"}, "dtype 'complex128'"),
        ({"dtype": "rand"}, "dtype 'rand'"),
        ({"pattern": "2:4"}, "does not have nnz 16|values is"),
        ({"pattern": "4:2"}, "4:2"),
        ({"pattern": "dense"}, "unknown pattern 'dense'"),
    ],
    ids=str,
)
def test_a_description_that_makes_no_sense_is_refused(change: dict[str, Any], complaint: str) -> None:
    packed = Bitmask.pack(torch.ones(2, 8))
    with pytest.raises(CheckpointError, match=complaint) as error:
        Bitmask.restore("model.w", packed.describe() | change, packed.tensors())
    assert str(error.value).startswith("model.w: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["", "_mask", "_offsets"])
def test_a_missing_tensor_is_named(suffix: str) -> None:
    packed = Bitmask.pack(torch.ones(2, 8))
    tensors = {key: tensor for key, tensor in packed.tensors().items() if key != suffix}
    with pytest.raises(CheckpointError, match="missing"):
        Bitmask.restore("w", packed.describe(), tensors)


@pytest.mark.parametrize(("pattern", "limit"), [("unstructured", 0.37), ("2:4", 0.57)])
@pytest.mark.parametrize("width", [512, 4096])
def test_size_at_70_percent_and_at_2_of_4(pattern: str, limit: float, width: int) -> None:
    shape = [64, width]
    nnz = round(0.3 * 64 * width) if pattern == "unstructured" else 32 * width
    described = {"shape": shape, "dtype": "bfloat16", "nnz": nnz, "pattern": pattern}
    assert stored_bytes(described) / (2 * 64 * width) <= limit
