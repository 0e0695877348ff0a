"""The loss that is left at the same zeros: every method alone, matched, matched with an allocation, and by effort.

`python -m eval.least DATA [--only stories260K,embedded] [--targets 0.7,2:4,…] [--settings alone,…] [--methods …] [--seeds 0]`

The embedded model is calibrated on 64 windows of 256 tokens of its nine held-out modules and measured on 64 of the fourteen
others; stories260K on the tokens that other projects' code was measured with (DATA/data/reference), 128 windows and 120.
`matching` keeps the method's mask, for the steps of the default effort; `default` and `best` are the efforts.
`kept` is the log-perplexity lost, as a share of what SparseGPT with `matching` loses at the same seed.

Rows are appended to eval/results/least.csv as they are measured; what stands there is not measured again. The cells that
tell most come first.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import llmsparse

RESULTS = Path(__file__).parent / "results" / "least.csv"
MATCHED: dict[str, Any] = {"match_steps": 200, "refine": "none"}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"effort": "default"},
    "matching": MATCHED | {"allocation": "uniform"},
    "best": {"effort": "best"},
    "alone": {"match_steps": 0, "allocation": "uniform"},
    "allocation + matching": MATCHED | {"allocation": "owl"},
}
BY_EFFORT = ("default", "best")  # whose mask is not the method's: measured with SparseGPT alone
METHODS = ("sparsegpt", "alps", "swaps", "wanda", "dsnot", "magnitude")
TARGETS = ("0.7", "2:4", "0.5", "0.6", "0.8")


@dataclass(frozen=True)
class Cell:
    """What is measured."""

    model: str
    target: str
    method: str
    setting: str
    seed: int


@dataclass(frozen=True)
class Row(Cell):
    """The perplexity of a cell."""

    dense: float
    perplexity: float
    sparsity: float
    steps: int  # of matching, a block
    seconds: float  # of the process

    @property
    def loss(self) -> float:
        """In log-perplexity."""
        return math.log(self.perplexity / self.dense)


class Bench:
    """A model and its text."""

    def __init__(self, name: str, data: Path) -> None:
        tokens = data / "data" / "reference"
        self.windows: dict[str, Any] = {}
        if name == "embedded":
            self.model, self.calibration, self.evaluation = "builtin", "builtin", "builtin"
            self.windows = {"calibration_samples": 64, "seq_len": 256}
        else:
            self.model = str(data / "models" / name)
            self.calibration = str(tokens / f"{name}_calibration.safetensors")
            self.evaluation = str(tokens / f"{name}_evaluation.safetensors")
        self.dense = self.measure(self.model)

    def measure(self, model: str) -> float:
        windows = {"seq_len": 256, "windows": 64} if self.windows else {}
        return llmsparse.perplexity(model, self.evaluation, device="cpu", **windows).perplexity

    def row(self, cell: Cell) -> Row:
        target = {"pattern": cell.target} if ":" in cell.target else {"sparsity": float(cell.target)}
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            report = llmsparse.prune(
                self.model, output=f"{folder}/pruned", method=cell.method, seed=cell.seed, calibration=self.calibration,
                device="cpu", **target, **self.windows, **SETTINGS[cell.setting],
            )  # fmt: skip
            seconds, found = time.process_time() - started, self.measure(report.output)
        steps = max((block.match["steps"] for block in report.blocks if block.match), default=0)
        return Row(
            **asdict(cell), dense=self.dense, perplexity=found, sparsity=report.sparsity, steps=steps, seconds=seconds
        )


def known() -> list[Row]:
    if not RESULTS.is_file():
        return []
    kinds = {"int": int, "float": float, "str": str}
    with RESULTS.open(newline="") as file:
        return [
            Row(**{field.name: kinds[str(field.type)](row[field.name]) for field in fields(Row)})
            for row in csv.DictReader(file)
        ]


def append(row: Row) -> None:
    new = not RESULTS.is_file()
    rounded = {"dense": 4, "perplexity": 4, "sparsity": 4, "seconds": 1}
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerow(
            {key: round(value, rounded[key]) if key in rounded else value for key, value in asdict(row).items()}
        )


def cells(models: Sequence[str], asked: argparse.Namespace) -> Iterator[Cell]:
    axes = (asked.seeds, asked.targets, asked.methods, asked.settings)
    for model, (seed, target, method, setting) in product(models, product(*(axis.split(",") for axis in axes))):
        if setting not in BY_EFFORT or method == METHODS[0]:
            yield Cell(model, target, method, setting, int(seed))


def kept(row: Row, rows: Sequence[Row]) -> str:
    """The share of the loss that is left."""
    for other in rows:
        at = (other.model, other.target, other.seed, other.method, other.setting)
        if at == (row.model, row.target, row.seed, METHODS[0], "matching"):
            return f", {row.loss / other.loss:.2f} of matching's loss"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default="stories260K,embedded")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0")
    asked = parser.parse_args()
    benches: dict[str, Bench] = {}
    for cell in cells(asked.only.split(","), asked):
        rows = known()
        if any(all(getattr(row, field.name) == getattr(cell, field.name) for field in fields(Cell)) for row in rows):
            continue
        if cell.model not in benches:
            benches[cell.model] = Bench(cell.model, asked.data)
        row = benches[cell.model].row(cell)
        append(row)
        said = f"{row.perplexity:.3f} ({row.dense:.3f}), {row.seconds:.0f} s{kept(row, rows)}"
        print(f"{cell.model} {cell.target} {cell.method} {cell.setting} seed {cell.seed}: {said}", flush=True)


if __name__ == "__main__":
    main()
