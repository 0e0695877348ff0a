"""The format of few bits: exact to the bit, cut and joined as the matrix is, and refused where it is damaged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.formats import check_description, layout, nested, restore, stored_bytes
from llmsparse.formats.nested import Nested


def numbers(*shape: int, spread: float = 1.0, seed: int = 0) -> Tensor:
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
    return draws.round().clamp(-127, 127).to(torch.int8)


def steps(rows: int, groups: int = 1, seed: int = 0) -> Tensor:
    return (torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed)) + 0.01).to(torch.bfloat16)


def same(one: Nested, other: Nested) -> bool:
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return one.describe() == other.describe() and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in matrices as small as these."""
    monkeypatch.setattr(nested, "TILE", 24)
    monkeypatch.setattr(nested, "TILE_ROWS", 2)


@given(
    experts=st.integers(0, 3),
    out=st.integers(0, 7),
    width=st.integers(1, 19),
    groups=st.integers(1, 3),
    spread=st.sampled_from([0.0, 0.4, 1.0, 30.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_it_unpacks_to_step_times_number_rounded_once(
    experts: int, out: int, width: int, groups: int, spread: float, dtype: torch.dtype, seed: int
) -> None:
    shape = (experts, out, width) if experts else (out, width)
    group = -(-width // groups)
    rows, groups = max(1, experts) * out, -(-width // group)
    q, each = numbers(*shape, spread=spread, seed=seed), steps(rows, groups, seed)
    packed = Nested.encode(q, each, dtype)
    assert torch.equal(packed.numbers(), q) and packed.nnz == q.count_nonzero()
    column = torch.arange(width) // group
    exact = q.double().view(rows, width) * each.double()[:, column]
    assert torch.equal(packed.unpack(), exact.to(dtype).view(shape))  # a product of 15 bits is exact in float64 too
    sizes = {suffix: (tuple(t.shape), t.dtype) for suffix, t in packed.tensors().items()}
    assert sizes == layout(packed.describe())
    assert sum(t.nbytes for t in packed.tensors().values()) == stored_bytes(packed.describe())
    again = restore("w", packed.describe(), packed.tensors())
    assert isinstance(again, Nested) and same(again, packed) and torch.equal(again.unpack(), packed.unpack())
    as_wide = restore("w", packed.describe(), packed.tensors(), torch.float32)
    assert torch.equal(as_wide.unpack(), packed.unpack().float())


@given(out=st.integers(1, 9), width=st.integers(1, 13), data=st.data())
def test_rows_are_those_of_the_weight(out: int, width: int, data: st.DataObject) -> None:
    packed = Nested.encode(numbers(out, width), steps(out), torch.bfloat16)
    start = data.draw(st.integers(0, out))
    stop = data.draw(st.integers(start, out))
    part = packed.rows(start, stop)
    assert part.shape == (stop - start, width) and torch.equal(part.unpack(), packed.unpack()[start:stop])
    assert part.nnz == part.numbers().count_nonzero()
    assert restore("w", part.describe(), part.tensors()).shape == part.shape


def test_the_matrices_of_experts_are_its_rows_and_join_to_it() -> None:
    packed = Nested.encode(numbers(3, 5, 12), steps(15, 3), torch.bfloat16)
    parts = [packed.rows(5 * expert, 5 * expert + 5) for expert in range(3)]
    assert all(torch.equal(part.unpack(), packed.unpack()[expert]) for expert, part in enumerate(parts))
    assert same(Nested.joined(parts), packed)


def test_emptied_and_filled_it_is_the_same() -> None:
    packed = Nested.encode(numbers(4, 8), steps(4), torch.bfloat16)
    assert same(packed.emptied().filled(packed.unpack()), packed)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no sizes": ({"shape": None}, "wanted two or more sizes"),
    "a size that is none": ({"shape": [4, True]}, "wanted two or more sizes"),
    "no tile": ({"tile": 0}, "wanted two or more sizes"),
    "no group": ({"group": 0}, "wanted two or more sizes"),
    "no digits": ({"digits": None}, "wanted two lists"),
    "digits too wide": ({"digits": [9]}, "wanted widths of 1 to 8"),
    "a sign in fours": ({"digits": [1, 1], "fours": [1]}, "wanted levels of 1 bit"),
    "another dtype": ({"dtype": "no_grad"}, "not one that can be packed"),
    "another format": ({"format": "nestde"}, "did you mean 'nested'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_descriptions_that_cannot_be(case: str) -> None:
    changes, wanted = WRONG[case]
    described = Nested.encode(numbers(4, 8), steps(4), torch.bfloat16).describe() | changes
    with pytest.raises(CheckpointError, match=wanted) as raised:
        check_description("config.json: w", described)
    assert str(raised.value).startswith("config.json: w: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("suffix", "change", "wanted"),
    [
        ("", lambda t: t[:-1], "stream is"),
        ("_steps", lambda t: t.float(), "_steps is"),
        ("_steps", lambda t: -t, "a step is negative"),
        ("_steps", lambda t: t * float("nan"), "a step is negative, NaN or too large"),
        ("_tiles", lambda t: t.flip(0), "tiles do not cut"),
        ("_tiles", lambda t: t.clamp(max=int(t[-2])), "tiles do not cut"),
        ("_tiles", lambda t: torch.cat((t[:1], t[1:2] - 1, t[2:])), "the stream of rows 0 to"),
        ("_tiles", lambda t: torch.cat((t[:1], t[1:2] + 1, t[2:])), "bytes too many"),
    ],
)
def test_damaged_tensors_are_refused(suffix: str, change: Any, wanted: str) -> None:
    packed = Nested.encode(numbers(7, 12), steps(7), torch.bfloat16)
    tensors = packed.tensors()
    with pytest.raises(CheckpointError, match=wanted) as raised:
        restore("w", packed.describe(), tensors | {suffix: change(tensors[suffix])})
    assert str(raised.value).startswith("w: ") and "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match=f"w{suffix} is missing"):
        restore("w", packed.describe(), {key: t for key, t in tensors.items() if key != suffix})


@given(seed=st.integers(0, 10**6), flips=st.integers(1, 3))
def test_flipped_bits_are_refused_or_read(seed: int, flips: int) -> None:
    packed = Nested.encode(numbers(7, 12, seed=seed), steps(7), torch.bfloat16)
    stream, draw = packed.stream.clone(), np.random.default_rng(seed)
    for _ in range(flips):
        stream[int(draw.integers(len(stream)))] ^= 1 << int(draw.integers(8))
    try:
        again = restore("w", packed.describe(), packed.tensors() | {"": stream})
    except CheckpointError:
        return
    assert again.unpack().shape == packed.shape


@pytest.mark.parametrize(("runs", "together"), [([24], 24), ([8, 16], 8), ([9, 15], 3), ([23, 1], 1)])
def test_rows_that_share_their_steps_have_them_on_disk_once(runs: list[int], together: int) -> None:
    q = torch.randint(-3, 4, (24, 40), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    steps = torch.cat([torch.full((count, 2), 0.5 + at) for at, count in enumerate(runs)]).bfloat16()
    packed = Nested.encode(q, steps, torch.bfloat16)
    assert packed.step_rows == together and packed.tensors()["_steps"].shape == (24 // together, 2)
    assert packed.parts()["steps"] == 2 * 2 * 24 // together
    described = packed.describe()
    again = Nested.restore("w", described, packed.tensors())
    assert torch.equal(again.unpack(), packed.unpack()) and torch.equal(again.steps, steps)
    assert again.describe() == described and again.moved(torch.device("cpu"), torch.float32).describe() == described
    part = again.rows(5, 19)
    assert part.step_rows == 1 and torch.equal(part.unpack(), packed.unpack()[5:19])
    stack = Nested.joined([packed, packed])
    assert torch.equal(stack.unpack()[1], packed.unpack())
    assert torch.equal(Nested.restore("w", stack.describe(), stack.tensors()).unpack(), stack.unpack())


@pytest.mark.parametrize("wrong", [0, 5, -1, 2.0, "4", True, None])
def test_rows_that_cannot_share_are_refused(wrong: Any) -> None:
    described = Nested.encode(
        torch.ones(24, 8, dtype=torch.int8), torch.ones(24, 1).bfloat16(), torch.bfloat16
    ).describe()
    with pytest.raises(CheckpointError, match=r"step_rows .*: wanted a divisor of the rows of a single matrix"):
        Nested.check("w", described | {"step_rows": wrong})
    with pytest.raises(CheckpointError, match="step_rows"):
        Nested.check("w", described | {"shape": [2, 24, 8], "step_rows": 4})
