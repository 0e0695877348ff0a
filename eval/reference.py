"""The authors' own figures, and ours on the same tokens.

`python -m eval.reference DATA` prunes `stories260K` with every method through the public API, calibrated and measured
on fixed tokens, and prints its perplexity beside that of the official implementation. DATA holds
`models/stories260K` and `data/reference/stories260K{.json,_calibration.safetensors,_evaluation.safetensors}`.
Writes eval/results/reference.csv.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import llmsparse
from llmsparse.pruning.effort import EffortName

RESULTS = Path(__file__).parent / "results" / "reference.csv"
TARGETS = ("0.5", "0.6", "0.7", "2:4")
OFFICIAL = {  # perplexity of the official code on the same tokens, per target
    "magnitude": (53.34, 96.77, 412.3, 138.67),
    "wanda": (23.25, 58.49, 160.9, 74.44),
    "sparsegpt": (22.30, 58.38, 146.3, 37.32),
    "alps": (14.44, 34.29, 63.68, 27.20),
    "dsnot": (310.0, 446.3, 922.6, 314.7),
}


@dataclass(frozen=True)
class Result:
    """One method at one target, alone (`fast`) or with what the effort adds."""

    method: str
    target: str
    effort: EffortName
    perplexity: float
    sparsity: float
    official: float
    seconds: float


def measure(data: Path, method: str, target: str, effort: EffortName = "fast", official: float | None = None) -> Result:
    """Prune stories260K and measure it, both on the reference tokens, with windows of 256.

    `official` is looked up by method and target unless it is given.
    """
    tokens = data / "data" / "reference"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pruned"
        report = llmsparse.prune(
            model=str(data / "models" / "stories260K"),
            output=str(output),
            method=method,
            calibration=str(tokens / "stories260K_calibration.safetensors"),
            effort=effort,
            device="cpu",
            **({"pattern": target} if ":" in target else {"sparsity": float(target)}),
        )
        measured = llmsparse.perplexity(
            str(output), str(tokens / "stories260K_evaluation.safetensors"), device="cpu"
        ).perplexity
    official = official or OFFICIAL[method][TARGETS.index(target)]
    return Result(method, target, effort, measured, report.sparsity, official, report.seconds)


def sweep(data: Path) -> Iterator[Result]:
    for method in OFFICIAL:
        for target in TARGETS:
            yield measure(data, method, target)
    for effort in ("default", "best"):
        for target in TARGETS:
            yield measure(data, "sparsegpt", target, effort)


def main() -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Result.__dataclass_fields__)
        for result in sweep(Path(sys.argv[1])):
            writer.writerow(
                [result.method, result.target, result.effort, f"{result.perplexity:.4f}", f"{result.sparsity:.4f}",
                 result.official, f"{result.seconds:.1f}"]
            )  # fmt: skip
            file.flush()
            print(
                f"{result.method:10s} {result.target:4s} {result.effort:7s}  ours {result.perplexity:8.2f} "
                f"({result.sparsity:.4f})  official {result.official:8.2f}  {result.seconds:5.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
