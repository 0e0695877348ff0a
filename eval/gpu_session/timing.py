"""Time on the device: CUDA graphs over copies of what is read, so that none is still in a cache, replayed by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from eval.gpu_session.record import DRY

ROUNDS = 1 if DRY else 40
WARM_UPS = 0 if DRY else 2


def once(run: Callable[[], object]) -> float:
    """Microseconds."""
    if DRY:
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def graphed(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A function that runs all calls, as one CUDA graph."""
    if DRY:
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def by_turns(graphs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Microseconds of each replay, sorted: all graphs in every round, after some to warm up."""
    taken = {name: list[float]() for name in graphs}
    for _ in range(WARM_UPS + ROUNDS):
        for name, run in graphs.items():
            taken[name].append(once(run))
    return {name: sorted(found[WARM_UPS:]) for name, found in taken.items()}


def copied(held: Any) -> Any:
    """The same numbers in memory of their own: a tensor, or a packed weight."""
    if isinstance(held, torch.Tensor):
        return held.clone()
    if isinstance(held, tuple) and hasattr(held, "_fields"):
        return type(held)(*map(copied, held))
    return held


def middle(found: list[float]) -> float:
    return statistics.median(found)
