"""Reports are JSON that any reader takes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llmsparse.storage.strict_json import finite, strict_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


@given(VALUES)
def test_whatever_is_in_it_a_strict_reader_takes_it(value: Any) -> None:
    assert json.loads(strict_json(value), parse_constant=refuse) == finite(value)


def test_only_what_is_no_number_becomes_null() -> None:
    assert finite({"a": [1.5, float("nan")], "b": (float("-inf"), 0, True, "NaN")}) == {
        "a": [1.5, None],
        "b": [None, 0, True, "NaN"],
    }
