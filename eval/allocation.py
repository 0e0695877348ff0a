"""Every allocation with SparseGPT and Wanda, without matching: perplexity at 50, 60, 70 and 80 %.

`python -m eval.allocation DATA [--only stories260K,embedded] [--sparsities 0.7,0.8] [--methods sparsegpt,wanda]
[--levels block,weight] [--allocations owl,…] [--seeds 0,1,2] [--match-steps 0]`

Calibrated on 64 windows of 256 tokens: stories260K on the first four fifths of TinyStories, the embedded model on its nine
held-out modules. Measured on the last fifth, and on the fourteen other held-out modules: windows that chose nothing.
`random` is the baseline that the others have to beat: as many random candidates as `search` has, the best by the loss of the
calibration text. DATA holds `models/stories260K` and `data/tinystories.txt`.

Rows are appended to eval/results/allocation.csv as they are measured; what stands there is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import llmsparse
from llmsparse.pruning.allocation import ALLOCATIONS, Search

RESULTS = Path(__file__).parent / "results" / "allocation.csv"
WINDOWS, LENGTH, EVALUATED = 64, 256, 64
NAMES: dict[str, Any] = {**{name: kind() for name, kind in ALLOCATIONS.items()}, "random": Search(evolve=False)}


@dataclass(frozen=True)
class Cell:
    """What is measured."""

    model: str
    sparsity: float
    method: str
    allocation: str
    level: str
    seed: int
    match_steps: int


@dataclass(frozen=True)
class Row(Cell):
    """The perplexity of a cell, and between which sparsities its units lie."""

    dense: float
    perplexity: float
    least: float
    most: float
    seconds: float  # of the process


class Bench:
    """A model and its text."""

    def __init__(self, name: str, data: Path, scratch: Path) -> None:
        self.name, self.scratch = name, scratch
        self.model, self.calibration, self.evaluation = "builtin", "builtin", "builtin"
        if name != "embedded":
            whole = (data / "data" / "tinystories.txt").read_text(encoding="utf-8")
            cut = len(whole) * 4 // 5
            self.model = str(data / "models" / name)
            self.calibration, self.evaluation = str(scratch / "train.txt"), str(scratch / "test.txt")
            Path(self.calibration).write_text(whole[:cut], encoding="utf-8")
            Path(self.evaluation).write_text(whole[cut:], encoding="utf-8")
        self.dense = self.measure(self.model)

    def measure(self, model: str) -> float:
        return llmsparse.perplexity(model, self.evaluation, seq_len=LENGTH, windows=EVALUATED).perplexity

    def row(self, cell: Cell) -> Row:
        started = time.process_time()
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            report = llmsparse.prune(
                self.model, output=f"{folder}/pruned", method=cell.method, sparsity=cell.sparsity, seed=cell.seed,
                allocation=NAMES[cell.allocation], allocation_level=cell.level, match_steps=cell.match_steps,
                calibration=self.calibration, calibration_samples=WINDOWS, seq_len=LENGTH,
            )  # fmt: skip
            seconds, found = time.process_time() - started, self.measure(report.output)
        asked = [row.sparsity_asked for row in report.rows]
        return Row(
            **asdict(cell), dense=self.dense, perplexity=found, least=min(asked), most=max(asked), seconds=seconds
        )


def known() -> set[Cell]:
    if not RESULTS.is_file():
        return set()
    with RESULTS.open(newline="") as file:
        kinds = {"sparsity": float, "seed": int, "match_steps": int}
        return {
            Cell(**{field.name: kinds.get(field.name, str)(row[field.name]) for field in fields(Cell)})
            for row in csv.DictReader(file)
        }


def append(row: Row) -> None:
    new = not RESULTS.is_file()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        rounded = {"dense": 4, "perplexity": 4, "least": 4, "most": 4, "seconds": 1}
        writer.writerow(
            {key: round(value, rounded[key]) if key in rounded else value for key, value in asdict(row).items()}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default="stories260K,embedded")
    parser.add_argument("--sparsities", default="0.5,0.6,0.7,0.8")
    parser.add_argument("--methods", default="sparsegpt,wanda")
    parser.add_argument("--allocations", default=",".join(NAMES))
    parser.add_argument("--levels", default="block,weight")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--match-steps", type=int, default=0)
    asked = parser.parse_args()
    done = known()
    for name in asked.only.split(","):
        # all blocks have the same shapes, and uniform has no units
        axes = (asked.seeds, asked.sparsities, asked.allocations, asked.levels, asked.methods)
        cells = [
            Cell(name, float(sparsity), method, allocation, level, int(seed), asked.match_steps)
            for seed, sparsity, allocation, level, method in product(*(axis.split(",") for axis in axes))
            if level != ("weight" if allocation == "uniform" else "block" if allocation in ("er", "erk") else "")
        ]
        left = [cell for cell in cells if cell not in done]
        if not left:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(name, asked.data, Path(scratch))
            for cell in left:
                row = bench.row(cell)
                append(row)
                print(f"{cell}: {row.perplexity:.3f} ({row.dense:.3f}), {row.seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
