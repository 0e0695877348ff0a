"""Ctrl-C and SIGTERM wait until a step is whole, so that what is saved then is what a longer run would have had."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """A context manager that holds back what the process's own handlers would do, for `deliver` to do it, at its end at the
    latest. A second signal of a kind is not held back. Does nothing outside the main thread, which alone gets signals."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._held: tuple[int, FrameType | None] | None = None

    @property
    def pending(self) -> bool:
        return self._held is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(handler := signal.getsignal(number)):  # SIG_DFL and SIG_IGN keep their ways
                    self._before[number] = handler
                    signal.signal(number, self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None:
            self.deliver()

    def deliver(self) -> None:
        """Do what was held back: as a rule, raise KeyboardInterrupt."""
        if self._held is not None:
            (number, frame), self._held = self._held, None
            self._before[number](number, frame)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._held = (number, frame)
        signal.signal(number, self._before[number])
