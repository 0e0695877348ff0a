"""In which keys two fingerprints differ: of two runs, or of two processes of one."""

from __future__ import annotations

import json
from typing import Any, cast


def spell_differences(one: dict[str, Any], other: dict[str, Any], when: tuple[str, str]) -> str:
    """The top-level keys in which two fingerprints differ, with the values where these are short; "" if in none. `when`
    are the words for the two: ("then", "now")."""
    details: list[str] = []
    for key in _differing(one, other):
        was, is_ = one.get(key), other.get(key)
        both = f"{json.dumps(was)} {when[0]}, {json.dumps(is_)} {when[1]}"
        parts = isinstance(was, dict) and isinstance(is_, dict)
        within = ", ".join(_differing(cast(dict[str, Any], was), cast(dict[str, Any], is_))) if parts else ""
        shown = both if len(both) < 90 else within
        details.append(f"{key} ({shown})" if shown else key)
    return ", ".join(details)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]
