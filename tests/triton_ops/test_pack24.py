from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from triton_ops import pack24 as packing
from triton_ops import reference
from triton_ops.pack24 import pack24, pack_rows, unpack24, unpack_rows

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize("n,k", [(16, 256), (1, 4), (63, 100), (48, 1792), (100, 2004)])


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@DTYPES
@SHAPES
def test_fragments_are_those_of_the_reference(
    sparse: Callable[..., Tensor], n: int, k: int, dtype: torch.dtype
) -> None:
    weight = sparse(n, k, dtype, torch.device("cpu"))
    padded = pad(weight, (0, -k % 256, 0, -n % 16))
    vals, meta = reference.pack24(padded, reference.stored(padded))
    packed = pack24(weight)
    assert torch.equal(packed.vals, vals) and torch.equal(packed.meta, meta)


@DTYPES
@SHAPES
def test_rows_are_those_of_the_reference(sparse: Callable[..., Tensor], n: int, k: int, dtype: torch.dtype) -> None:
    weight = sparse(n, k, dtype, torch.device("cpu"))
    padded = pad(weight, (0, -k % 32))
    values, places = reference.rows24(padded, reference.stored(padded))
    packed = pack_rows(weight)
    assert torch.equal(packed.pairs, values.view(torch.int32)) and torch.equal(packed.places, places)


@DTYPES
@SHAPES
@pytest.mark.parametrize("pack,unpack", [(pack24, unpack24), (pack_rows, unpack_rows)], ids=["fragments", "rows"])
def test_a_weight_comes_back_to_the_bit(
    pack: Callable, unpack: Callable, sparse: Callable, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    weight = sparse(n, k, dtype, device)
    assert same(unpack(pack(weight)), weight)
    assert same(unpack(pack(weight, reference.mask24(weight))), weight)


@given(st.data())
def test_any_bits_at_any_two_places_come_back(data: st.DataObject) -> None:
    rows, groups = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    bits = torch.randint(-(2**15), 2**15, (rows, groups * 4), generator=generator, dtype=torch.int16)
    keep = torch.rand(rows, groups, 4, generator=generator).argsort(-1).flatten(1) < data.draw(st.integers(0, 2))
    weight = (bits * keep).view(torch.float16)  # NaNs and -0.0 among them
    for packed, restored in ((pack24(weight, keep), unpack24), (pack_rows(weight, keep), unpack_rows)):
        assert same(restored(packed), weight)


def test_some_rows_at_a_time_are_all_rows_at_once(
    sparse: Callable[..., Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = sparse(100, 600, torch.bfloat16, device)
    whole = pack24(weight), pack_rows(weight)
    monkeypatch.setattr(packing, "CHUNK", 16 * 600 // 4 * 2)
    for packed, wanted in zip((pack24(weight), pack_rows(weight)), whole, strict=True):
        assert torch.equal(packed[0], wanted[0]) and torch.equal(packed[1], wanted[1])


def test_a_weight_takes_nine_bits(sparse: Callable[..., Tensor]) -> None:
    weight = sparse(64, 1024, torch.bfloat16, torch.device("cpu"))
    for packed in (pack24(weight), pack_rows(weight)):
        assert (packed[0].nbytes + packed[1].nbytes) * 8 / weight.numel() == packing.BITS_PER_WEIGHT


@pytest.mark.parametrize("pack", [pack24, pack_rows])
def test_what_is_not_24_is_refused(pack: Callable[..., object], sparse: Callable[..., Tensor]) -> None:
    weight = sparse(20, 64, torch.bfloat16, torch.device("cpu"))
    dense = weight.clone()
    dense[17, 4:8] = 1
    with pytest.raises(ValueError, match="row 17 keeps more than 2 of 4"):
        pack(dense)
    with pytest.raises(ValueError, match="the keep-mask leaves out a weight"):
        pack(weight, torch.zeros_like(weight, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"K a multiple of 4, got \(20, 62\)"):
        pack(weight[:, :62])
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        pack(weight.float())
