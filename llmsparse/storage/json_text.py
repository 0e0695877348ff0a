"""JSON that every reader takes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, cast


def json_text(value: Any, *, indent: int = 2, ensure_ascii: bool = True) -> str:
    """`value` as JSON, with null for NaN and infinities, which JSON has no word for."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def finite(value: Any) -> Any:
    """The same with None in the place of every number that is none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in cast(Sequence[Any], value)]
    return value
