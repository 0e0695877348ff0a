"""What a run takes when its blocks come from a slow disk: the longer of reading and computing, or their sum.

`python -m eval.overlap [--repeats 3]` builds a synthetic Llama of 40 blocks and prunes it by Wanda three ways, by turns:
from memory (computing alone), read and dropped (reading alone, through a reader that sleeps as long as a disk of
`--megabytes` a second would), and as a run does it, from that slow disk. Appends medians to eval/results/overlap.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import llmsparse
from eval.speed import SHAPES, build
from llmsparse.storage.checkpoint import CheckpointReader

RESULTS = Path(__file__).parent / "results" / "overlap.csv"
SHAPE = replace(
    SHAPES["cpu"], name="synthetic", hidden=512, ffn=2048, heads=8, kv_heads=4, blocks=40, windows=2, tokens=64
)


def throttled(folder: Path, bytes_per_second: float) -> Callable[[CheckpointReader, Iterable[str]], dict[str, Tensor]]:
    """CheckpointReader.read as if `folder` lay on a disk of this speed; what a run has written is in the page cache."""
    read = CheckpointReader.read

    def slowly(self: CheckpointReader, keys: Iterable[str]) -> dict[str, Tensor]:
        if self.folder != folder:
            return read(self, keys)
        started, tensors = time.perf_counter(), read(self, keys)
        needed = sum(tensor.nbytes for tensor in tensors.values()) / bytes_per_second
        time.sleep(max(0.0, needed - (time.perf_counter() - started)))
        return tensors

    return slowly


def seconds_of(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200.0, help="of the disk, a second")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(SHAPE, folder)
        model, out = folder / "model", folder / "out"

        def prune() -> None:
            llmsparse.prune(
                model=str(model), output=str(out), sparsity=0.5, method="wanda", match_steps=0, device="cpu",
                calibration=str(folder / "tokens.safetensors"), overwrite=True,
            )  # fmt: skip

        def read() -> None:
            reader = CheckpointReader(model)
            for key in reader:
                reader.read([key])

        slow = mock.patch.object(CheckpointReader, "read", throttled(model, arguments.megabytes * 1e6))
        prune()
        rows: list[tuple[float, float, float]] = []
        for _ in range(arguments.repeats):
            computing = seconds_of(prune)
            with slow:
                rows.append((computing, seconds_of(read), seconds_of(prune)))
    computing, reading, run = (statistics.median(column) for column in zip(*rows, strict=True))
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "blocks": SHAPE.blocks,
        "megabytes_a_second": arguments.megabytes,
        "computing": round(computing, 2),
        "reading": round(reading, 2),
        "run": round(run, 2),
        "over_the_longer": round(run / max(computing, reading), 3),
        "over_the_sum": round(run / (computing + reading), 3),
        "repeats": arguments.repeats,
        "threads": torch.get_num_threads(),
    }
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row)


if __name__ == "__main__":
    main()
