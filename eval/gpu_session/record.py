"""What a session finds: lines of JSON in $OUT/session.jsonl, each synced at once, for a session may end at any moment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

OUT = Path(os.environ.get("OUT", "/tmp/gpu_session"))
DRY = not torch.cuda.is_available()
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
DEVICE = torch.device("cpu" if DRY else "cuda")
TINY = {"4096x14336": (20, 260), "28672x8192": (16, 64), "4096x4096": (16, 64)}  # in the dry, for these shapes
STARTED = time.monotonic()


def say(stage: str, **facts: object) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"stage": stage, "at": round(time.monotonic() - STARTED, 1)} | facts, default=str)
    with (OUT / "session.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(line[:300], flush=True)


@contextmanager
def attempt(stage: str, **facts: object) -> Iterator[None]:
    """What fails within is a line, and the stage goes on; unless the device is lost to this process."""
    try:
        yield
    except Exception as error:
        say(stage, **facts, failed=f"{type(error).__name__}: {error}"[:300])
        if "CUDA error" in str(error):
            raise


def shape_of(name: str) -> tuple[int, int]:
    """ "4096x14336" → rows and inputs of a weight."""
    if DRY:
        return TINY[name]
    n, k = name.split("x")
    return int(n), int(k)


def summary() -> None:
    """The times as a table, and every line that tells of a failure."""
    if not (OUT / "session.jsonl").exists():
        print("nothing was found")
        return
    lines = [json.loads(line) for line in (OUT / "session.jsonl").read_text(encoding="utf-8").splitlines()]
    for one in lines:
        if one["stage"] == "times" and "us" in one:
            ratio = f"{one['us']:8.1f} µs {one['vs_dense']:5.2f} × dense"
            print(f"{one['shape']:>11} M={one['m']:<2} {one['kernel']:<22} {ratio}")
    for one in lines:
        if one["stage"] in ("decode", "prune", "experts", "library") or not is_right(one):
            print(json.dumps({key: value for key, value in one.items() if key != "trace"})[:260])


def is_right(line: dict[str, object]) -> bool:
    failed = ("failed" in line and not line.get("expected")) or "crashed" in line
    return not (failed or line.get("wrong") or line.get("ok") is False)
