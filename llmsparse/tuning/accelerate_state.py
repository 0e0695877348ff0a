"""What accelerate remembers for the whole process, put aside while a run uses accelerate itself."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from accelerate.state import AcceleratorState, GradientState, PartialState


@contextmanager
def accelerate_set_aside() -> Generator[None]:
    """accelerate as in a new process; behind it a caller's own Accelerator finds its precision, device and accumulation."""
    shared = [cast(dict[str, Any], one._shared_state) for one in (AcceleratorState, PartialState, GradientState)]
    kept = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, before in zip(shared, kept, strict=True):
            state.clear()
            state.update(before)
