"""What a run says while it works: bars for blocks and for the batches within one, time left, memory. On stderr.

Bars only where a person watches: not in a pipe, not under CI, not with --quiet. There -v gives a line a block, for the
log of a long run. Lines logged are shown without bars too, unless quiet. The library itself is silent (`Silent()`)
until it is given something else.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class Progress(Protocol):
    """A context manager that may be entered again after it was left."""

    def start(self, blocks: int) -> None:
        """Begin counting: `blocks` will be announced."""
        ...

    def block(self, name: str) -> None:
        """Work on the next block begins; the one before it, if any, is done."""
        ...

    def batches(self, description: str, total: int) -> Callable[[], None]:
        """Begin a stretch of `total` steps within the block; call the result after each."""
        ...

    def log(self, line: str) -> None:
        """Tell the user something that they should know and that does not end the run."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Silent:
    """No bars. Logged lines go to `stream`, if there is one."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def start(self, blocks: int) -> None: ...

    def block(self, name: str) -> None: ...

    def batches(self, description: str, total: int) -> Callable[[], None]:
        return lambda: None

    def log(self, line: str) -> None:
        if self._stream is not None:
            print(line, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Lines(Silent):
    """One plain line for each block as it begins: its name and number, time passed and time left."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._blocks = self._number = 0
        self._started = 0.0

    def start(self, blocks: int) -> None:
        self._blocks, self._number, self._started = blocks, 0, time.monotonic()

    def block(self, name: str) -> None:
        done, self._number = self._number, self._number + 1
        passed = time.monotonic() - self._started
        left = f", about {_clock(passed / done * (self._blocks - done))} left" if done else ""
        self.log(f"{name}, {self._number} of {self._blocks}, {_clock(passed)} passed{left}")


class Rich:
    """Two bars on a terminal: blocks with the time left and the memory held, and what happens within the block."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True)
        self._bars: Bars | None = None
        self._blocks: TaskID | None = None
        self._batches: TaskID | None = None
        self._begun = False  # a block is being worked on

    def __enter__(self) -> Self:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=self._console,
            transient=True,
            refresh_per_second=4,
            speed_estimate_period=3600,  # blocks take minutes: the default of 30 s would forget the last one
        )
        self._blocks = self._batches = None
        self._bars.start()
        return self

    def start(self, blocks: int) -> None:
        if self._bars is not None:
            self._drop()
            self._blocks = self._bars.add_task("blocks", total=blocks, memory="")
            self._begun = False

    def block(self, name: str) -> None:
        if self._bars is None or self._blocks is None:
            return
        self._bars.update(self._blocks, advance=int(self._begun), description=name, memory=memory_held())
        self._begun = True

    def batches(self, description: str, total: int) -> Callable[[], None]:
        bars = self._bars
        if bars is None:
            return lambda: None
        if self._batches is not None:
            bars.remove_task(self._batches)
        task = self._batches = bars.add_task(f"  {description}", total=total, memory="")

        def advance() -> None:
            if task == self._batches:  # a stretch that has been replaced has no bar any more
                bars.advance(task)
                if self._blocks is not None:
                    bars.update(self._blocks, memory=memory_held())

        return advance

    def log(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._drop()
            self._bars.stop()
            self._bars = None

    def _drop(self) -> None:
        for task in (self._blocks, self._batches):
            if task is not None and self._bars is not None:
                self._bars.remove_task(task)
        self._blocks = self._batches = None


def for_terminal(quiet: bool = False, verbose: bool = False) -> Progress:
    """What suits this process: bars on a terminal; in a pipe or under CI what is logged, and a line a block if verbose;
    nothing when quiet."""
    if quiet:
        return Silent()
    if watched():
        return Rich()
    return Lines(sys.stderr) if verbose else Silent(sys.stderr)


def watched() -> bool:
    """Whether a person sees stderr as it is written."""
    under_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return sys.stderr.isatty() and not under_ci and os.environ.get("TERM") != "dumb"


def _clock(seconds: float) -> str:
    """3725 → "1:02:05"."""
    return str(timedelta(seconds=round(seconds)))


def memory_held() -> str:
    """ "1.2 GB", resident memory of the process; with "+ 3.4 GB GPU" once torch has taken some."""
    held = ""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            held = f"{int(statm.read().split()[1]) * os.sysconf('SC_PAGESIZE') / 1e9:.1f} GB"
    except OSError:  # no /proc: a bar without memory
        pass
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        held += f" + {torch.cuda.memory_allocated() / 1e9:.1f} GB GPU"
    return held
