"""How long products take, measured side by side: one round runs every candidate once, so that a slow moment of the
machine hits all of them.

A candidate is a list of calls that do the same with copies of a weight of their own: enough that whatever a call reads
has long left the cache. On a GPU the calls of a candidate are one CUDA graph, timed by events; on a CPU each call is
timed as the model would make it, Python included.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Call = Callable[[], object]
Name = TypeVar("Name")
Timer = Callable[[], float]  # runs something once and returns the seconds of one call

TIMES_CACHE = 4  # bytes that the copies of a weight have together, over those of the last-level cache
MOST_COPIES = 64  # for small weights, which then stay in the cache; `Spread` cannot tell, whoever asks must
LEAST_ROUNDS, MOST_ROUNDS, WARM_ROUNDS = 7, 400, 2


@dataclass(frozen=True)
class Spread:
    """Seconds of a call, over the rounds."""

    median: float
    p25: float
    p75: float
    least: float
    rounds: int


def side_by_side(candidates: Mapping[Name, Sequence[Call]], device: torch.device, seconds: float) -> dict[Name, Spread]:
    """Time candidates by turns, for about `seconds` in all, a few rounds at least."""
    with current(device), torch.inference_mode():
        timers = {name: timer(calls, device) for name, calls in candidates.items()}
        for _ in range(WARM_ROUNDS):
            for once in timers.values():
                once()
        taken: dict[Name, list[float]] = {name: [] for name in timers}
        started, rounds = time.perf_counter(), 0
        while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() - started < seconds):
            for name, once in timers.items():
                taken[name].append(once())
            rounds += 1
    return {name: spread(times) for name, times in taken.items()}


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the one that graphs are captured on, events recorded on and kernels launched on: a graph that is captured
    on another holds nothing, and takes no time."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def timer(calls: Sequence[Call], device: torch.device) -> Timer:
    """On a CPU the next of `calls` each time; on a GPU, the `current` one, all of them in a graph."""
    if device.type != "cuda":
        following = itertools.cycle(calls)

        def once() -> float:
            call = next(following)
            started = time.perf_counter()
            call()
            return time.perf_counter() - started

        return once
    for call in calls:  # kernels are compiled, and workspaces allocated, before the capture
        call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)

    return replay


def spread(times: Sequence[float]) -> Spread:
    """Median and quartiles of two or more measurements."""
    p25, median, p75 = statistics.quantiles(times, n=4, method="inclusive")
    return Spread(median, p25, p75, min(times), len(times))


def copies_for(weight_bytes: int, cache_bytes: int) -> int:
    """How many copies of a weight to rotate."""
    return min(MOST_COPIES, max(2, -(-TIMES_CACHE * cache_bytes // max(1, weight_bytes))))


def copy_bandwidth(device: torch.device, cache_bytes: int) -> float:
    """Bytes a second that torch reads and writes when it copies a tensor much larger than the cache."""
    size = max(64 * 2**20, TIMES_CACHE * cache_bytes)
    a, b = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    taken = side_by_side({"copy": [lambda: b.copy_(a)]}, device, 0.5)["copy"]
    return 2 * size / taken.median


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: of the GPU, or what Linux says of the CPU (32 MiB where it says nothing)."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)  # pyright: ignore[reportUnknownVariableType]
        return int(about.L2_cache_size)  # pyright: ignore[reportUnknownArgumentType]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    known = [int(size[:-1]) * units[size[-1]] for size in sizes if size[:-1].isdigit() and size[-1] in units]
    return max(known, default=32 * 2**20)
