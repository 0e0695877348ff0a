"""JSON that any reader takes: the format has no NaN and no infinity, though Python writes them."""

from __future__ import annotations

import json
import math
from typing import Any, cast


def strict_json(value: Any) -> str:
    """Indented JSON; null stands for a number that is not finite.

    >>> strict_json({"loss": float("nan")})
    '{\\n  "loss": null\\n}'
    """
    return json.dumps(finite(value), indent=2, allow_nan=False, ensure_ascii=False)


def finite(value: Any) -> Any:
    """The same, with None for every number that is NaN or infinite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
