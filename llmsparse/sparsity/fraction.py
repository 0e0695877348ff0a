"""A fraction as a user writes it."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any


def parse_fraction(value: Any, what: str = "fraction of zeros") -> float:
    """0.7, "0.7" or "70%" → 0.7. ValueError for anything that is not in [0, 1)."""
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]{1,3})?%?", text):
        raise ValueError(f"got {value!r}, wanted a {what} such as 0.7, or 70%")
    fraction = Decimal(text.removesuffix("%")) / (100 if text.endswith("%") else 1)  # exact: 33.3% is 0.333
    if not 0 <= fraction < 1:
        example = (
            f"; for {fraction}% write {fraction / 100} or {fraction}%" if 1 < fraction < 100 else " such as 0.7 or 70%"
        )
        raise ValueError(f"got {text}, wanted a {what}, at least 0 and below 1{example}")
    return float(fraction)
