"""Perplexity of smaller models: experts, blocks, FFN channels and heads taken out, beside zeros that take as many bytes.

    python -m eval.shrink [DATA] [--only mixture,builtin,stories260K] [--seeds 0,1,2]

Experts go out of a small mixture, which `eval/mixture.py` trains where it is not there yet; blocks and widths out of the
embedded model and, where DATA is given, out of `DATA/models/stories260K`. Rows are appended to eval/results/shrink.csv as
they are measured; what is there is not measured again, so an interrupted run goes on.

Calibration: 48 windows of 256 tokens, drawn by the seed from the calibration modules of the standard library; for stories260K
96 of the 128 in the calibration tokens of DATA. Measured: 48 windows of 256 tokens of text that neither training nor
calibration saw, by plain transformers in fp32. The loss is the difference of the mean log-likelihood of a token,
ln(perplexity / dense perplexity).
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmsparse
from eval.mixture import trained_mixture
from llmsparse.demo.train import token_stream
from llmsparse.models.origin import BUILTIN_FOLDER
from llmsparse.shrinking.recipe import EXPERT_SCORES
from llmsparse.text import builtin as corpus

RESULTS = Path(__file__).parent / "results" / "shrink.csv"
WINDOWS, LENGTH = 48, 256
STORED_WINDOWS = 96  # for calibration, of those that are stored
MATCH_STEPS = 24
FITS: dict[str, dict[str, Any]] = {
    "none": {"refit": False},
    "refit": {"refit": True},
    "refit + matching": {"refit": True, "match_steps": MATCH_STEPS},
}


@dataclass
class Subject:
    """A model, text to calibrate it on, and windows to measure it on."""

    name: str
    folder: Path
    calibration: str
    windows: Tensor  # (WINDOWS, LENGTH)

    def calibration_for(self, seed: int, scratch: Path) -> dict[str, Any]:
        """Where the windows of a seed come from. Stored ones have one order, so that they are drawn here."""
        if not self.calibration.endswith(".safetensors"):
            return {"calibration": self.calibration, "calibration_samples": WINDOWS}
        ids, drawn = load_file(self.calibration)["input_ids"], scratch / f"calibration_{seed}.safetensors"
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:STORED_WINDOWS]
        save_file({"input_ids": ids[order, :LENGTH].contiguous()}, drawn)
        return {"calibration": str(drawn), "calibration_samples": STORED_WINDOWS}

    @cached_property
    def dense(self) -> float:
        """Its perplexity."""
        return perplexity(self.folder, self.windows)


@dataclass(frozen=True)
class Case:
    """One smaller model; what tells its row from others."""

    model: str
    cut: str  # experts, blocks, ffn, heads; or what zeros are made by
    left: str  # how much of it stays; of zeros, how many bytes: those of that smaller model
    score: str
    fit: str
    seed: int


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    model: str
    cut: str
    left: str
    score: str
    fit: str
    seed: int
    bytes: int  # of the weights, as they are stored
    dense_bytes: int
    dense: float
    perplexity: float
    loss: float
    seconds: float  # of the processor


def subjects(data: Path | None, only: list[str]) -> Iterator[Subject]:
    if "mixture" in only:
        folder = trained_mixture()
        yield Subject("mixture", folder, "builtin", builtin_windows(folder))
    if "builtin" in only:
        yield Subject("builtin", BUILTIN_FOLDER, "builtin", builtin_windows(BUILTIN_FOLDER))
    if "stories260K" in only and data is not None:
        tokens = data / "data" / "reference"
        held_out = load_file(tokens / "stories260K_evaluation.safetensors")["input_ids"][:WINDOWS, :LENGTH].long()
        calibration = str(tokens / "stories260K_calibration.safetensors")
        yield Subject("stories260K", data / "models" / "stories260K", calibration, held_out)


def builtin_windows(folder: Path) -> Tensor:
    stream = token_stream(AutoTokenizer.from_pretrained(folder), corpus.texts("evaluation"))
    return stream[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)


def cases(subject: Subject, seed: int) -> Iterator[Case]:
    name = subject.name
    if name == "mixture":
        for left in ("50%", "75%"):
            for score in EXPERT_SCORES:
                yield from (Case(name, "experts", left, score, fit, seed) for fit in FITS)
        return
    for left in ("75%", "50%"):
        for score in ("suffix", "influence"):
            yield from (Case(name, "blocks", left, score, fit, seed) for fit in FITS)
    for cut, shares in (("ffn", ("75%", "50%")), ("heads", ("50%",))):
        for left in shares:
            yield from (Case(name, cut, left, "energy", fit, seed) for fit in FITS)
    for other in ("blocks 75%", "ffn 75%", "ffn 50%", "heads 50%"):
        yield Case(name, "zeros, packed", other, "sparsegpt", "none", seed)


@torch.no_grad()
def perplexity(folder: Path, windows: Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [model(ids, labels=ids).loss * len(ids) for ids in windows.split(8)]
    return math.exp(float(torch.stack(losses).sum()) / len(windows))


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def make(subject: Subject, case: Case, output: Path, rows: list[Result]) -> Path:
    """The smaller model of a case; returns the folder that is measured."""
    common: dict[str, Any] = {
        "model": str(subject.folder), "output": str(output), "seed": case.seed, "seq_len": LENGTH, "device": "cpu",
        **subject.calibration_for(case.seed, output.parent),
    }  # fmt: skip
    if case.cut != "zeros, packed":
        scored = {} if case.score == "energy" else {"score": case.score}
        llmsparse.shrink(**common, **{case.cut: case.left}, **scored, **FITS[case.fit])
        return output
    wanted = next(row.bytes for row in rows if (row.model, f"{row.cut} {row.left}") == (case.model, case.left))
    llmsparse.prune(**common, method="sparsegpt", sparsity=sparsity_for(subject.folder, wanted), match_steps=0)
    return output


def sparsity_for(folder: Path, wanted: int) -> float:
    """How many zeros the matrices of the blocks need, for the packed model to take so many bytes: a bit for every weight, and
    those that are not 0."""
    tensors = [pair for file in folder.glob("*.safetensors") for pair in load_file(file).items()]
    matrices = [tensor for name, tensor in tensors if tensor.dim() == 2 and ".layers." in name]
    weights, size = sum(tensor.numel() for tensor in matrices), matrices[0].element_size()
    return (stored_bytes(folder) + weights / 8 - wanted) / (weights * size)


def measure(subject: Subject, case: Case, rows: list[Result]) -> Result:
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make(subject, case, Path(scratch) / "out", rows)
        seconds = time.process_time() - started
        after, before = perplexity(folder, subject.windows), subject.dense
        held = stored_bytes(folder)
        if case.cut == "zeros, packed":
            llmsparse.pack(folder, Path(scratch) / "packed")
            held = stored_bytes(Path(scratch) / "packed")
    return Result(
        **asdict(case),
        bytes=held,
        dense_bytes=stored_bytes(subject.folder),
        dense=round(before, 4),
        perplexity=round(after, 4),
        loss=round(math.log(after / before), 5),
        seconds=round(seconds, 1),
    )


def read() -> list[Result]:
    if not RESULTS.exists():
        return []
    kinds = {field.name: {"int": int, "float": float, "str": str}[str(field.type)] for field in fields(Result)}
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return [Result(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def write(rows: list[Result]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder with models/stories260K and its tokens")
    parser.add_argument("--only", default="builtin,stories260K,mixture")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    rows = read()
    known = {Case(*(getattr(row, field.name) for field in fields(Case))) for row in rows}
    models = list(subjects(args.data, args.only.split(",")))
    seeds = [int(seed) for seed in args.seeds.split(",")]
    wanted = [(subject, case) for seed in seeds for subject in models for case in cases(subject, seed)]
    for subject, case in sorted(wanted, key=lambda pair: "matching" in pair[1].fit):  # what takes longest comes last
        if case not in known:
            rows.append(measure(subject, case, rows))
            write(rows)
            print(f"{case}: {rows[-1].dense:.3f} → {rows[-1].perplexity:.3f}, {rows[-1].loss:+.4f}", flush=True)


if __name__ == "__main__":
    main()
