from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsparse.serving.stop import Stop


def said(pieces: list[str], strings: list[str]) -> tuple[str, bool]:
    stop = Stop(strings)
    return "".join(stop.take(piece) for piece in pieces) + stop.end(), stop.found


@given(st.lists(st.text("ab\n", max_size=4)), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], strings: list[str]) -> None:
    whole = "".join(pieces)
    ends = [whole.find(string) for string in strings if string in whole]
    assert said(pieces, strings) == (whole[: min(ends)] if ends else whole, bool(ends))


@pytest.mark.parametrize("pieces", [["abc\n", "\nd"], ["abc", "\n\n", "d"], ["a", "b", "c", "\n", "\n", "d"]])
def test_a_string_across_pieces_is_found(pieces: list[str]) -> None:
    assert said(pieces, ["\n\n"]) == ("abc", True)


def test_text_is_held_back_only_while_it_may_be_the_beginning_of_a_string() -> None:
    stop = Stop(["END"])
    assert [stop.take(piece) for piece in ("xE", "N", "x", "yEN")] == ["x", "", "ENx", "y"]
    assert stop.end() == "EN"
