"""Which of several processes this one is, as whoever launched it says: torchrun, accelerate launch, or a script like them.

Read from the environment alone, so that it can be known before torch is imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from llmsparse.errors import RecipeError

LAUNCH = "start all of them with torchrun or accelerate launch"


@dataclass(frozen=True)
class Place:
    """`rank` of `size` processes, `local_rank` of `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched() -> Place:
    """Where this process stands; alone unless WORLD_SIZE says otherwise. RecipeError for what is no such place."""
    size = _number("WORLD_SIZE", 1, 1)
    if size == 1:
        return Place()
    if "RANK" not in os.environ:
        raise RecipeError(
            f"WORLD_SIZE is {size}, but RANK is not set: {LAUNCH}, or unset WORLD_SIZE to run in one process"
        )
    rank = _number("RANK", 0, 0)
    local_size = _number("LOCAL_WORLD_SIZE", 1, 1)
    local_rank = _number("LOCAL_RANK", rank % local_size, 0)
    if rank >= size or local_rank >= local_size:
        raise RecipeError(
            f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank} of {local_size}: no such place; {LAUNCH}"
        )
    return Place(rank, size, local_rank, local_size)


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, "") or str(default)
    if not text.isdecimal() or int(text) < least:
        raise RecipeError(f"{name}={text!r}: wanted a whole number of at least {least}; {LAUNCH}")
    return int(text)
