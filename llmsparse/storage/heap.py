"""Memory that has been freed, given back to the system."""

from __future__ import annotations

import ctypes


def release_freed() -> None:
    """Give freed heap pages back to the system.

    glibc keeps blocks of up to 32 MiB on its heap once such blocks have been freed, and the holes between them add up
    from block to block of the model: without this, peak memory grows with depth although no tensor is held.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
