"""What is known of a layer that is not packed, and that torch does not run either."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LeanLayer:
    """What runs a layer, up to so many tokens at once; for more of them it is torch."""

    layer: str
    runs: str
    tokens: int
    because: str
