"""Tokens per second and memory of whole models, dense beside sparse: each run in a process of its own, by turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmsparse
from llmsparse.errors import MachineError

PROMPT = "import os\n\n\ndef main("
REPEATS = 3
# the cores that this process may use, as long as this module is imported before torch: OMP_PROC_BIND makes torch bind
# the thread that imports it to one of them, and a child would inherit just that one
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


@dataclass(frozen=True)
class Decoding:
    """What `llmsparse generate` measured, several times over. Memory is after the first token."""

    run: str  # dense, or the backend or implementation of experts
    tokens_per_second: float
    least: float
    most: float
    memory_bytes: int
    load_seconds: float
    new_tokens: int


def decode(runs: Mapping[str, Sequence[str]], *, device: str, tokens: int, repeats: int = REPEATS) -> list[Decoding]:
    """Generate once for each of `runs` (what to call it → model and options of `generate`), `repeats` times over.

    MachineError with the reason where a process fails.
    """
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (model, *options) in runs.items():
            taken[name].append(_generate(model, [*options, "--device", device, "--max-new-tokens", str(tokens)]))
    return [_summary(name, results) for name, results in taken.items()]


def _generate(model: str, options: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "llmsparse", "generate", model, "--prompt", PROMPT, "--json", *options]
    root = str(Path(llmsparse.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with _all_cores():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
    out, err = process.communicate()
    if process.returncode:
        last = (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise MachineError(f"generate with {' '.join(options[:2])} failed: {last.removeprefix('error: ')}")
    return json.loads(out)


@contextmanager
def _all_cores() -> Generator[None, None, None]:
    if CORES is None:
        yield
        return
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def _summary(name: str, results: Sequence[dict[str, Any]]) -> Decoding:
    speeds = [float(result["tokens_per_second"] or 0) for result in results]
    return Decoding(
        name,
        statistics.median(speeds),
        min(speeds),
        max(speeds),
        round(statistics.median(result["memory_bytes"] for result in results)),
        statistics.median(result["load_seconds"] for result in results),
        min(result["new_tokens"] for result in results),
    )
