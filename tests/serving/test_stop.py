from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsparse.serving.stop import Stop


def said(pieces: list[str], strings: list[str]) -> tuple[str, bool]:
    stop = Stop(strings)
    return "".join(stop.take(piece) for piece in pieces) + stop.end(), stop.found


def expected(text: str, strings: list[str]) -> tuple[str, bool]:
    """Letter by letter: up to the longest of the strings that the text ends with first."""
    for end in range(1, len(text) + 1):
        whole = [len(string) for string in strings if text[:end].endswith(string)]
        if whole:
            return text[: end - max(whole)], True
    return text, False


@given(st.lists(st.text("ab\n", max_size=4)), st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], strings: list[str]) -> None:
    assert said(pieces, strings) == expected("".join(pieces), strings)


def test_one_string_ends_the_text_where_it_is_found_first() -> None:
    for string in ("aab", "abab", "aaa"):
        text = "aaabababaaa"
        assert said(list(text), [string]) == (text[: text.find(string)], True)


@pytest.mark.parametrize("pieces", [["abc\n", "\nd"], ["abc", "\n\n", "d"], ["a", "b", "c", "\n", "\n", "d"]])
def test_a_string_across_pieces_is_found(pieces: list[str]) -> None:
    assert said(pieces, ["\n\n"]) == ("abc", True)


def test_text_is_held_back_only_while_it_may_be_the_beginning_of_a_string() -> None:
    stop = Stop(["END"])
    assert [stop.take(piece) for piece in ("xE", "N", "x", "yEN")] == ["x", "", "ENx", "y"]
    assert stop.end() == "EN"
