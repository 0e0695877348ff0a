"""Streams of small numbers: digits of d bits without gaps, flags in fours, and how whole numbers become levels of them.

A code is a list of widths, one a level, that says how a small integer q is written (docs/packed-format.md):

    level 1    a digit for every place: 0, +1, -1, +2, …; its largest value means "more" than the others reach
    level 2    a digit for each "more": its lowest bit is the sign, the others how much more; the largest: more again
    level 3 …  a digit for each "more" of the level before: how much more; the largest: more again

but for the last level, whose largest value is a number like the others. So one code is a mask with signs and bit planes
(1, 1, 1, 1), another 0, +1, -1 and escapes in two bits (2, 1, 1), a third a mask with int8 values (1, 8).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

LARGEST = 127  # |q|
WIDEST = 8  # bits a digit
NO_NUMBER = "holds a digit that stands for no number"
BEHIND = "has bits behind the last place"


class DamagedStream(ValueError):
    """Bytes that are not what the code says; the message is a few words."""


@dataclass(frozen=True)
class Code:
    """`digits`: bits of a digit, level by level; `fours`: numbers of the levels, from 0, whose flags are stored in fours."""

    digits: tuple[int, ...]
    fours: frozenset[int] = frozenset()

    @cached_property
    def finals(self) -> tuple[int, ...]:
        """Level by level, the largest |q| that ends there; that of the last one is the largest there is."""
        ends: list[int] = []
        for level, width in enumerate(self.digits):
            last = level == len(self.digits) - 1
            if level == 0:
                ends.append(2 ** (width - 1) - 1)
            else:
                ends.append(ends[-1] + 2 ** (width - (level == 1)) - (not last))
        return tuple(ends)

    def problem(self) -> str | None:
        """What is wrong with it, in a few words, or None."""
        if not self.digits or not all(1 <= width <= WIDEST for width in self.digits) or self.digits == (1,):
            return f"digits {list(self.digits)}: wanted widths of 1 to {WIDEST} bits that can write a number"
        if self.finals[:-1] and self.finals[-2] >= LARGEST:
            return f"digits {list(self.digits)} go on behind {LARGEST}"
        strange = [level for level in self.fours if level >= len(self.digits) or level == 1 or self.digits[level] != 1]
        return f"fours {sorted(self.fours)}: wanted levels of 1 bit that are no signs" if strange else None


def encode(q: Any, code: Code) -> bytes:
    """int8 (items,) → its levels, each a whole number of bytes."""
    magnitude = np.abs(q.astype(np.int16))
    parts: list[bytes] = []
    for level, width in enumerate(code.digits):
        last, final = level == len(code.digits) - 1, code.finals[level]
        top = 2**width - 1
        if level == 0:
            digit = np.where(magnitude > final, top, 2 * magnitude - (q > 0))
        elif level == 1:
            reached = code.finals[0]
            over = magnitude - reached - 1 if last else np.minimum(magnitude - reached - 1, top >> 1)
            digit = 2 * over + (q < 0)
        else:
            reached = code.finals[level - 1]
            digit = magnitude - reached - 1 if last else np.minimum(magnitude - reached - 1, top)
        parts.append(_fours(digit) if level in code.fours else pack(digit, width))
        more = magnitude > final
        q, magnitude = q[more], magnitude[more]
    assert not len(q), "a number that the code cannot write"
    return b"".join(parts)


def decode(data: Any, items: int, code: Code) -> Any:
    """The inverse: uint8 (bytes,) → int8 (items,). DamagedStream where the bytes are not as many, or not such."""
    q = np.zeros(items, np.int16)
    places: Any = None  # of what is still open, in q
    negative: Any = None
    for level, width in enumerate(code.digits):
        last = level == len(code.digits) - 1
        count = items if places is None else len(places)
        digit, data = _read(data, count, width, level in code.fours)
        top, final = 2**width - 1, code.finals[level]
        if level == 0:
            q = np.where(digit & 1, (digit + 1) >> 1, -(digit >> 1)).astype(np.int16)
            places = np.flatnonzero(digit == top)
            if last and len(places):
                raise DamagedStream(NO_NUMBER)
            continue
        over = digit >> 1 if level == 1 else digit
        negative = (digit & 1).astype(bool) if level == 1 else negative
        assert places is not None
        value = code.finals[level - 1] + 1 + over.astype(np.int16)
        if last and value.max(initial=0) > LARGEST:
            raise DamagedStream(NO_NUMBER)
        q[places] = np.where(negative, -value, value)
        more = value > final
        places, negative = places[more], negative[more]
    if len(data):
        raise DamagedStream(f"has {len(data)} bytes too many")
    return q.astype(np.int8)


def sizes(data: Any, items: int, code: Code) -> list[int]:
    """Level by level, how many of the bytes `decode` would read, which it then can; no number is made. DamagedStream."""
    left, count = [len(data)], items
    for level, width in enumerate(code.digits):
        if level in code.fours:
            groups, data = _take(data, -(-count // 4), 1)
            flagged = int(np.bitwise_count(groups).sum())
            flags, data = _take(data, 4 * flagged, 1)
            if count % 4 and int(groups[-1]).bit_length() - 1 == (count - 1) // 4 % 8:
                _refuse_behind(int(flags[-1]) >> 4 * (flagged - 1) % 8, count)
            count = int(np.bitwise_count(flags).sum())
            left.append(len(data))
            continue
        raw, data = _take(data, count, width)
        if level == len(code.digits) - 1:
            _refuse_large(raw, count, level, code)
        elif level == 1 and width == 1:
            pass  # signs: all of these go on
        elif width > 2:
            digit, top = unpack(raw, count, width), 2**width - 1
            count = int(np.count_nonzero(digit >> 1 == top >> 1 if level == 1 else digit == top))
        else:
            full = raw if width == 1 else raw >> 1 & 0x55 if level == 1 else raw & raw >> 1 & 0x55
            count = int(np.bitwise_count(full).sum())
        left.append(len(data))
    return [before - behind for before, behind in pairwise(left)]


def nonzeros(data: Any, items: int, code: Code) -> int:
    """How many numbers other than 0 are in a stream that `sizes` has passed."""
    width = code.digits[0]
    raw, behind = _take(data, -(-items // 4) if 0 in code.fours else items, width)
    if 0 in code.fours:
        raw, _ = _take(behind, 4 * int(np.bitwise_count(raw).sum()), 1)
    if width == 1:
        return int(np.bitwise_count(raw).sum())
    return int(
        np.bitwise_count((raw | raw >> 1) & 0x55).sum() if width == 2 else np.count_nonzero(unpack(raw, items, width))
    )


def pack(digit: Any, width: int) -> bytes:
    """Numbers below 2^width → their bits, the lowest first, one number behind the other."""
    if width == 8:
        return digit.astype(np.uint8).tobytes()
    bits = digit.astype(np.uint8)[:, None] >> np.arange(width, dtype=np.uint8) & 1
    return np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def unpack(raw: Any, items: int, width: int) -> Any:
    """The inverse: uint8 (bytes,) → uint8 (items,)."""
    if width == 8:
        return raw
    if 8 % width == 0:
        return (raw[:, None] >> np.arange(0, 8, width, dtype=np.uint8) & 2**width - 1).reshape(-1)[:items]
    bits = np.unpackbits(raw, count=items * width, bitorder="little").reshape(items, width)
    return (bits << np.arange(width, dtype=np.uint8)).sum(1, dtype=np.uint8)


def fours_bits(flag: Any) -> int:
    """Bits that flags take in fours."""
    return -(-len(flag) // 4) + 4 * int(_grouped(flag).any(1).sum())


def _fours(flag: Any) -> bytes:
    grouped = _grouped(flag)
    some = grouped.any(1)
    return pack(some, 1) + pack(grouped[some].reshape(-1), 1)


def _grouped(flag: Any) -> Any:
    padded = np.zeros(-(-len(flag) // 4) * 4, np.uint8)
    padded[: len(flag)] = flag
    return padded.reshape(-1, 4)


def _read(data: Any, count: int, width: int, fours: bool) -> tuple[Any, Any]:
    """Digits (count,) uint8 of one level, and the bytes behind them."""
    if not fours:
        raw, data = _take(data, count, width)
        return unpack(raw, count, width), data
    raw, data = _take(data, -(-count // 4), 1)
    some = unpack(raw, -(-count // 4), 1).astype(bool)
    raw, data = _take(data, 4 * int(some.sum()), 1)
    grouped = np.zeros((len(some), 4), np.uint8)
    grouped[some] = unpack(raw, 4 * int(some.sum()), 1).reshape(-1, 4)
    if grouped.reshape(-1)[count:].any():
        raise DamagedStream(BEHIND)
    return grouped.reshape(-1)[:count], data


def _refuse_behind(flags: int, count: int) -> None:
    """DamagedStream where the last four flags hold one that is behind the last of `count`."""
    if (flags & 15) >> count % 4:
        raise DamagedStream(BEHIND)


def _refuse_large(raw: Any, count: int, level: int, code: Code) -> None:
    """DamagedStream where a digit of the last level stands for no number: `more` where there is none, or above LARGEST."""
    width, first = code.digits[level], code.finals[level - 1] + 1
    most = 2**width - 2 if level == 0 else (LARGEST - first) * (1 + (level == 1)) + (level == 1)
    if most < 2**width - 1 and unpack(raw, count, width).max(initial=0) > most:
        raise DamagedStream(NO_NUMBER)


def _take(data: Any, items: int, width: int) -> tuple[Any, Any]:
    """The bytes of so many digits, and those behind them."""
    bits = items * width
    size = -(-bits // 8)
    if len(data) < size:
        raise DamagedStream(f"ends {size - len(data)} bytes early")
    if bits % 8 and int(data[size - 1]) >> bits % 8:
        raise DamagedStream(BEHIND)
    return data[:size], data[size:]
