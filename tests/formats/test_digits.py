"""Small integers in digits: worked by hand, back again, near their entropy, and never read out of bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmsparse.formats.digits import Code, DamagedStream, decode, encode, nonzeros, sizes
from llmsparse.formats.shortest import shortest_code

Numbers = NDArray[np.int8]


@st.composite
def numbers(draw: st.DrawFn) -> Numbers:
    """Any number of int8 numbers of any spread, zeros among them; -128 is none that can be written."""
    size, spread = draw(st.integers(0, 300)), draw(st.sampled_from([0.0, 0.3, 1.0, 3.0, 40.0, 300.0]))
    draws = np.random.default_rng(draw(st.integers(0, 2**32))).standard_normal(size) * spread
    return np.clip(np.round(draws), -127, 127).astype(np.int8)


@st.composite
def codes(draw: st.DrawFn) -> Code:
    """Any code that reaches 127."""
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=7))
    fours = [level for level, width in enumerate(widths) if width == 1 and level != 1 and draw(st.booleans())]
    return Code((*widths, 8), frozenset(fours)) if draw(st.integers(0, 9)) else Code((8,))


def bytes_of(text: str) -> bytes:
    """Bits as they are written, the first in front, each byte filled up with zeros."""
    return bytes(int(byte[::-1], 2) for byte in text.split())


def test_planes_worked_by_hand() -> None:
    code = Code((1, 1, 1, 1, 1))
    q = np.array([0, 1, -2, 0, 0, 4, -1, 0, 3], np.int8)
    nonzero, negative, above_1, above_2, above_3 = map(bytes_of, ("01100110 1", "01010", "01101", "011", "10"))
    assert encode(q, code) == nonzero + negative + above_1 + above_2 + above_3


def test_two_bits_and_escapes_worked_by_hand() -> None:
    code = Code((2, 1, 1, 1))
    q = np.array([0, 1, -1, 2, -3, 4], np.int8)
    assert encode(q, code) == bytes_of("00100111 1111") + bytes_of("010") + bytes_of("011") + bytes_of("01")
    assert (decode(np.frombuffer(encode(q, code), np.uint8), 6, code) == q).all()


def test_a_mask_and_whole_numbers_worked_by_hand() -> None:
    code = Code((1, 8))
    q = np.array([0, -1, 0, 100], np.int8)
    assert encode(q, code) == bytes([0b1010, 1, 2 * 99])


def test_flags_in_fours_worked_by_hand() -> None:
    code = Code((1, 1), frozenset({0}))
    q = np.array([0, 0, 0, 0, 1, 0, 0, -1, 0, 0], np.int8)
    assert encode(q, code) == bytes_of("010") + bytes_of("1001") + bytes_of("01")


@given(numbers(), codes())
def test_every_code_gives_its_numbers_back(q: Numbers, code: Code) -> None:
    assert code.problem() is None
    data = np.frombuffer(encode(q, code), np.uint8)
    assert (decode(data, len(q), code) == q).all()
    assert sum(sizes(data, len(q), code)) == len(data)
    assert nonzeros(data, len(q), code) == np.count_nonzero(q)


@given(numbers())
def test_the_shortest_code_takes_what_it_says_and_no_more_than_others(q: Numbers) -> None:
    code, bits = shortest_code(q)
    assert code.problem() is None
    data = encode(q, code)
    assert bits <= 8 * len(data) < bits + 8 * (len(code.digits) + len(code.fours)) + 1
    assert (decode(np.frombuffer(data, np.uint8), len(q), code) == q).all()
    for other in (Code((8,)), Code((1, 8)), Code((2, 1, 8)), Code((1, 1, 1, 1, 8), frozenset({2, 3}))):
        assert 8 * len(data) <= 8 * len(encode(q, other)) + 8 * (len(code.digits) + len(code.fours))


@pytest.mark.parametrize("step", [0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.7])
def test_it_comes_near_the_entropy_of_normal_weights(step: float) -> None:
    q = np.round(np.random.default_rng(0).standard_normal(2**17) / step).astype(np.int8)
    share = np.bincount(q.astype(int) + 128) / len(q)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert entropy < shortest_code(q)[1] / len(q) < entropy + 0.16


@given(numbers(), codes(), st.data())
def test_a_damaged_stream_is_refused_or_read_within_its_bytes(q: Numbers, code: Code, data: st.DataObject) -> None:
    raw = bytearray(encode(q, code))
    for _ in range(data.draw(st.integers(1, 3))):
        if raw and data.draw(st.booleans()):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        else:
            raw = raw[: data.draw(st.integers(0, len(raw)))] + bytes(data.draw(st.integers(0, 2)))
    stream, items = np.frombuffer(bytes(raw), np.uint8), len(q)
    try:
        size = sum(sizes(stream, items, code))
    except DamagedStream:
        with pytest.raises(DamagedStream):
            decode(stream, items, code)
        return
    found = decode(stream[:size], items, code)
    assert (decode(np.frombuffer(encode(found, code), np.uint8), items, code) == found).all()


@pytest.mark.parametrize(
    ("digits", "fours"),
    [((), ()), ((0, 1), ()), ((9,), ()), ((1,), ()), ((1, 1), (1,)), ((2, 1), (0,)), ((1, 1), (2,)), ((8, 1, 1), ())],
)
def test_codes_that_cannot_be(digits: tuple[int, ...], fours: tuple[int, ...]) -> None:
    assert Code(digits, frozenset(fours)).problem()
