from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llmsparse.serving.encoding import PORTION, encoded, event

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_is_written_in_portions_is_read_as_a_whole(value: Any) -> None:
    assert json.loads(encoded(value)) == value


def test_long_lists_are_whole_at_every_length_about_a_portion() -> None:
    for length in (PORTION - 1, PORTION, PORTION + 1, 2 * PORTION, 2 * PORTION + 1):
        value = {"a": [{"b": list(range(length))}], "c": [None] * length}
        assert json.loads(encoded(value)) == value


def test_an_event_is_one_line_and_an_empty_one() -> None:
    assert event({"text": "a\n\nb"}) == b'data: {"text": "a\\n\\nb"}\n\n'
