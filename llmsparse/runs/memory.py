"""How much memory a run needed.

Mapped file pages count as resident memory but the system takes them back at will, so the honest figure on a CPU is
the *anonymous* memory. The kernel keeps no high-water mark of it: a thread samples it.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import torch

LOADED_LATER = 24 * 2**20  # libraries that are loaded, and threads that start, only once a run is under way: measured
FREED = 2**27  # freed blocks of up to 32 MiB that glibc keeps on the heaps of a run's threads, at most ...
FREED_SHARE = 2  # ... and at most twice the bytes of a block: measured


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process in bytes (RssAnon; all resident memory where the system lacks it)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    return psutil.Process().memory_info().rss


def used_bytes(device: torch.device) -> int:
    """What this process holds now: GPU memory that torch has allocated, or on a CPU the proportional set size, which
    counts mapped pages too, shared ones in part (all resident memory where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as rollup:
            for line in rollup:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    return psutil.Process().memory_info().rss


def footprint_bytes(device: torch.device) -> int:
    """What this process holds before a run has read a weight and will hold throughout: interpreter, libraries, a model
    without weights. Nothing on a GPU, where only what torch allocates counts."""
    return 0 if device.type == "cuda" else anonymous_bytes() + LOADED_LATER


def freed_bytes(device: torch.device, block: int) -> int:
    """What a run on a CPU holds though it has been freed, for the next block of so many bytes as it is stored: holes in
    the heap, given back only between blocks (storage/heap.py)."""
    return min(FREED, FREED_SHARE * block) if device.type == "cpu" else 0


def available_bytes(device: torch.device, processes: int = 1) -> int:
    """Memory that can still be taken: free GPU memory and what torch has reserved of it and lies idle, or the smaller of
    free RAM and the cgroup's rest, of which each of so many `processes` gets its part."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    try:
        with open("/proc/meminfo", encoding="ascii") as info:
            free = next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        import psutil

        return int(psutil.virtual_memory().available) // processes
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current") as used,
        ):
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no cgroup, or its limit reads "max"
        pass
    return free // processes


class PeakMemory:
    """Context manager: `.bytes` is the peak of a run, GPU allocations on CUDA and anonymous memory on a CPU."""

    def __init__(self, device: torch.device, interval_seconds: float = 0.02) -> None:
        self.device = device
        self.bytes = 0
        self._interval = interval_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.bytes = anonymous_bytes()
            self._thread.start()
        return self

    def read(self) -> int:
        """The peak so far, in bytes."""
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.bytes = max(self.bytes, anonymous_bytes())
        return self.bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.read()
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
