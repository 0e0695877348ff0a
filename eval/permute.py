"""What inputs in another order are worth at 2:4: every method by effort, with and without.

`python -m eval.permute DATA [--only stories260K,embedded] [--efforts fast,default] [--methods …] [--seeds 0]`

Models, texts and windows are those of eval.least. `kept_before` and `kept_after` are the mean shares of the scores' energy
that the pattern keeps in the matrices that are reordered, `difference` the largest relative one that the order alone makes to
a block's output. Rows are appended to eval/results/permute.csv; what stands there is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import llmsparse
from eval.least import Bench

RESULTS = Path(__file__).parent / "results" / "permute.csv"


@dataclass(frozen=True)
class Row:
    """One run."""

    model: str
    method: str
    effort: str
    permute: str
    seed: int
    dense: str
    perplexity: str
    seconds: str  # of the process
    kept_before: str = ""
    kept_after: str = ""
    difference: str = ""


def measured(bench: Bench, name: str, effort: str, method: str, permute: str, seed: int) -> Row:
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        report = llmsparse.prune(
            bench.model, output=f"{folder}/pruned", method=method, pattern="2:4", effort=effort, permute=permute,
            seed=seed, calibration=bench.calibration, device="cpu", **bench.windows,
        )  # fmt: skip
        seconds, found = time.process_time() - started, bench.measure(report.output)
    row = Row(name, method, effort, permute, seed, f"{bench.dense:.4f}", f"{found:.4f}", f"{seconds:.1f}")
    made = [one for one in report.permuted if one.folds]
    if not made:
        return row
    before, after = (sum(getattr(one, what) for one in made) / len(made) for what in ("before", "after"))
    largest = max(one.difference for one in made)
    kept = {"kept_before": f"{before:.4f}", "kept_after": f"{after:.4f}", "difference": f"{largest:.1e}"}
    return Row(**(asdict(row) | kept))


def known() -> list[tuple[str, ...]]:
    if not RESULTS.is_file():
        return []
    with RESULTS.open(newline="") as file:
        return [tuple(list(row.values())[:5]) for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default="stories260K,embedded")
    parser.add_argument("--efforts", default="fast,default")
    parser.add_argument("--methods", default="sparsegpt,wanda,magnitude")
    parser.add_argument("--seeds", default="0")
    asked = parser.parse_args()
    lists = (asked.seeds, asked.efforts, asked.methods)
    for name in asked.only.split(","):
        bench = Bench(name, asked.data)
        for seed, effort, method in product(*(one.split(",") for one in lists)):
            for permute in ("off", "auto"):
                if (name, method, effort, permute, seed) in known():
                    continue
                row = measured(bench, name, effort, method, permute, int(seed))
                new = not RESULTS.is_file()
                with RESULTS.open("a", newline="") as file:
                    writer = csv.DictWriter(file, [field.name for field in fields(Row)])
                    if new:
                        writer.writeheader()
                    writer.writerow(asdict(row))
                print(*asdict(row).values(), flush=True)


if __name__ == "__main__":
    main()
