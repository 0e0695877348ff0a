"""How much a run may take for how little loss: the settings that `effort` stands for. Keys that the user set win.

Figures behind the table: docs/LOG.md, 2026-11-28.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EffortName = Literal["fast", "default", "best"]
UNIFORM_UP_TO = 0.55  # of the sparsities, all units get the same


@dataclass(frozen=True)
class Effort:
    """`match_steps` of a block: the first that a CPU does in `seconds` on its own estimate, or none. Where blocks are matched,
    masks are `refine`d, and at N:M inputs are reordered that fold if it `permutes`. `beyond`: the allocation above
    UNIFORM_UP_TO of a run without matching; with it all get the same."""

    match_steps: tuple[int, ...]
    seconds: float
    refine: Literal["none", "fading"]
    beyond: str
    permutes: bool


EFFORTS: dict[EffortName, Effort] = {
    "fast": Effort((), 0.0, "none", "uniform", permutes=False),
    "default": Effort((200, 100, 50), 600.0, "fading", "owl", permutes=True),
    "best": Effort((600, 300, 200, 100), 3600.0, "fading", "owl", permutes=True),
}
