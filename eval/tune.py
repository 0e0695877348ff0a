"""Perplexity after tuning a factorized model, beside the dense one it came from and what it was before.

`python -m eval.tune [MODEL] [TEXT] [SEED] [WHAT,…]` (builtin builtin 0 experts,router,lora) factorizes MODEL with the
shipped recipe factorize-50, tunes the result for 500 steps of 8 windows of 256 tokens, and writes a row to
eval/results/tune.csv for each WHAT is trained; rows of the same model, seed and WHAT are replaced.

`builtin` calibrates on the calibration modules of the standard library, trains on those that the embedded model was
trained on, and measures on the evaluation modules, which neither model has ever seen. Another TEXT is measured on its
evaluation split, where it has one.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch

import llmsparse
from llmsparse.factorization.recipe import FactorizeRecipe
from llmsparse.tuning.recipe import TuneRecipe

RESULTS = Path(__file__).parent / "results" / "tune.csv"
RECIPE = "factorize-50"
STEPS, WINDOWS, SEQ_LEN = 500, 8, 256
DTYPE = "bfloat16"  # of the products; the masters are fp32


@dataclass(frozen=True)
class Result:
    """One tuning. Perplexities are per token, on all full windows of `seq_len` tokens of `measured_on`, in fp32."""

    model: str
    factorized: str  # the recipe
    train: str
    seed: int
    steps: int
    tokens_per_step: int
    seq_len: int
    products: str  # their dtype
    threads: int
    trained_on: str
    measured_on: str
    measured_tokens: int
    dense: float
    before: float
    after: float
    ratio_before: float
    ratio_after: float
    seconds: float
    versions: str


def measure(model: str, text: str) -> llmsparse.Perplexity:
    return llmsparse.perplexity(model, text, seq_len=SEQ_LEN, device="cpu", dtype="float32")


def run(model: str, text: str, seed: int, kinds: list[str]) -> list[Result]:
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        moe = f"{scratch}/moe"
        common = {"output": moe, "calibration": text, "seed": str(seed), "device": "cpu"}
        llmsparse.factorize(FactorizeRecipe.load(RECIPE, {"model": model, **common}))
        dense, before = measure(model, text), measure(moe, text)
        for train in kinds:
            recipe = TuneRecipe(
                model=moe, teacher=model, output=f"{scratch}/{train}", text=text, train=train, steps=STEPS, seed=seed,
                batch_size=WINDOWS, seq_len=SEQ_LEN, dtype=DTYPE, device="cpu",
            )  # fmt: skip
            report = llmsparse.tune(recipe)
            after = measure(report.output, text)
            results.append(
                Result(
                    model=Path(model).name,
                    factorized=RECIPE,
                    train=train,
                    seed=seed,
                    steps=STEPS,
                    tokens_per_step=WINDOWS * SEQ_LEN,
                    seq_len=SEQ_LEN,
                    products=DTYPE,
                    threads=torch.get_num_threads(),
                    trained_on=report.protocol.get("text", text),
                    measured_on=after.protocol.get("text", text),
                    measured_tokens=after.tokens,
                    dense=round(dense.perplexity, 4),
                    before=round(before.perplexity, 4),
                    after=round(after.perplexity, 4),
                    ratio_before=round(before.perplexity / dense.perplexity, 4),
                    ratio_after=round(after.perplexity / dense.perplexity, 4),
                    seconds=round(report.seconds, 1),
                    versions=" ".join(f"{name} {version}" for name, version in report.versions.items()),
                )
            )
            print(f"{train:8s} dense {dense.perplexity:.4f}  x{results[-1].ratio_before:.4f} before, "
                  f"x{results[-1].ratio_after:.4f} after {STEPS} steps", flush=True)  # fmt: skip
            write(results)
    return results


def write(results: list[Result]) -> None:
    """Put these rows into the table, in the place of those of the same model, seed and kind."""
    names = [field.name for field in fields(Result)]
    kept: list[list[str]] = []
    new = {(result.model, result.train, str(result.seed)) for result in results}
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        kept = [[row[name] for name in names] for row in rows if (row["model"], row["train"], row["seed"]) not in new]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *kept, *map(astuple, results)])


def main() -> None:
    model, text, seed, kinds = [*sys.argv[1:], *["builtin", "builtin", "0", "experts,router,lora"][len(sys.argv) - 1 :]]
    run(model, text, int(seed), kinds.split(","))


if __name__ == "__main__":
    main()
