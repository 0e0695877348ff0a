"""Bring a checkpoint's files into the page cache while the model is still being built.

What maps a file reads it as it is touched, piece by piece in one thread, between other work. Asked for in advance, a
fast disk delivers several times as fast.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from llmsparse.runs.memory import available_bytes

PIECE = 2**21  # Linux reads no more than this ahead for one request


def read_ahead(files: Sequence[str | Path]) -> threading.Thread | None:
    """Start to read `files`, in their order. None where the system cannot, or where they would fill more than half of
    the memory that is free: pages would be gone again before they are used."""
    if not hasattr(os, "posix_fadvise"):
        return None
    with contextlib.suppress(OSError):  # whoever opens the file says what is wrong with it
        if sum(os.path.getsize(file) for file in files) * 2 < available_bytes(torch.device("cpu")):
            thread = threading.Thread(target=_read, args=(list(files),), daemon=True)
            thread.start()
            return thread
    return None


def _read(files: Sequence[str | Path]) -> None:
    with contextlib.suppress(OSError):
        for file in files:
            number = os.open(file, os.O_RDONLY)
            try:
                for begin in range(0, os.fstat(number).st_size, PIECE):
                    os.posix_fadvise(number, begin, PIECE, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(number)
