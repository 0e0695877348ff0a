"""Perplexity against stored bits a weight: ours, masks, and plain quantization, on the same models and texts.

`python -m eval.frontier DATA [--models NAME,…] [--only PREFIX]` takes the embedded model, and `stories260K` and
`babyllama-tok361` of DATA/models in bf16, and writes eval/results/frontier.csv row by row; what is there already is not made
again. DATA/data/tinystories.txt is the text of the latter two: three quarters of it to calibrate on, the rest to measure on.
The embedded model is calibrated and measured on held-out modules of Python's standard library.

    bits        stored bits a weight of the linear weights, everything counted: masks, offsets, steps, scales, zero points
    loss        log(perplexity / perplexity of the dense model)
    seed        of the calibration windows

quantize is `llmsparse quantize --bits --group row`, where `matched` says so with block matching; quantize-matrix has one step for each
matrix; mask is SparseGPT, likewise, packed; mask-int8
and mask-int4 are `quantize --values` of such a mask; gptq and rtn are eval/group_quantization.py; llama.cpp is its own quantizer
with an importance matrix (eval/llama_cpp.py), where the model is wide enough for its blocks of 256 and `--llama-cpp` names its
source tree.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import llmsparse
from eval.group_quantization import bits_of, quantize_model
from eval.llama_cpp import KINDS, LlamaCpp
from llmsparse.models.origin import BUILTIN_FOLDER
from llmsparse.packing.folder import PackedCheckpoint

RESULTS = Path(__file__).parent / "results" / "frontier.csv"
SAMPLES = 64
WINDOWS = 64  # to measure on
BITS = (1.7, 3.0, 3.5, 4.0)  # besides 2, 2.3 and 2.7
SEEDS = (0, 1, 2)
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
MATCH_STEPS = 75
GROUPS = {"embedded": (64, 128), "stories260K": (32, 32), "babyllama-tok361": (32, 32)}  # of 2 bits, and of more


@dataclass(frozen=True)
class Case:
    """One point of the figure."""

    model: str
    method: str
    setting: str  # bits and group, or sparsity
    seed: int


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    model: str
    method: str
    setting: str
    seed: int
    bits: float
    perplexity: float
    loss: float
    entropy: float | None = None  # of the numbers, of ours
    zeros: float | None = None


@dataclass(frozen=True)
class Model:
    """A dense model in bf16, and its texts."""

    name: str
    folder: Path
    calibration: str
    evaluation: str
    seq_len: int


def models(data: Path, scratch: Path) -> Iterator[Model]:
    """The models in bf16, and tinystories in two parts."""
    yield Model("embedded", BUILTIN_FOLDER, "builtin", "builtin", 256)
    story = (data / "data" / "tinystories.txt").read_text(encoding="utf-8")
    cut = 3 * len(story) // 4
    calibration, evaluation = scratch / "calibration.txt", scratch / "evaluation.txt"
    calibration.write_text(story[:cut], encoding="utf-8")
    evaluation.write_text(story[cut:], encoding="utf-8")
    for name in ("stories260K", "babyllama-tok361"):
        folder = scratch / name
        shutil.copytree(data / "models" / name, folder, copy_function=shutil.copyfile)
        folder.chmod(0o755)
        weights = load_file(folder / "model.safetensors")
        save_file({key: w.bfloat16() for key, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        yield Model(name, folder, str(calibration), str(evaluation), 256)


def cases(model: str) -> Iterator[Case]:
    """All points of a model, what matters most first."""
    yield Case(model, "dense", "", 0)
    few, more = (f"{bits} g{group}" for bits, group in zip((2, 3), GROUPS[model], strict=True))
    for seed in SEEDS:
        for method, setting in (
            ("quantize", "2.3"),
            ("gptq", few),
            ("quantize", "2.7"),
            ("gptq", more),
            ("quantize", "2"),
        ):
            yield Case(model, method, setting, seed)
    for bits in (2.3, 2.7, 2, *BITS):
        yield Case(model, "quantize-matrix", f"{bits:g}", 0)
    for seed, bits in product(SEEDS, BITS):
        yield Case(model, "quantize", f"{bits:g}", seed)
    for sparsity in SPARSITIES:
        yield Case(model, "mask", f"{sparsity:g}", 0)
    for sparsity, kind in ((0.7, "int8"), (0.7, "int4"), (0.5, "int4")):
        yield Case(model, f"mask-{kind}", f"{sparsity:g}", 0)
    for bits in (2, 3, 4, 8):
        for method in ("rtn", "gptq"):
            yield Case(model, method, f"{bits} g{GROUPS[model][bits > 2]}", 0)
    yield Case(model, "mask", "0.7 matched", 0)
    for bits in ("2", "2.3"):
        yield Case(model, "quantize", f"{bits} matched", 0)
    for kind in KINDS if GROUPS[model][1] % 128 == 0 else ():  # widths are multiples of its blocks of 256
        yield Case(model, "llama.cpp", kind, 0)


def make(case: Case, model: Model, scratch: Path, rival: LlamaCpp | None) -> tuple[Path, float, dict[str, float]]:
    """The dense checkpoint that a case comes to, its bits a weight, and what else a row says."""
    out, dense = scratch / "out", scratch / "dense"
    run: dict[str, Any] = {"calibration": model.calibration, "calibration_samples": SAMPLES, "seq_len": model.seq_len}
    run |= {"seed": case.seed, "device": "cpu", "dtype": "float32"}
    if case.method == "dense":
        return model.folder, 16.0, {}
    text: dict[str, Any] = {"text": model.calibration, "samples": SAMPLES, "seq_len": model.seq_len, "seed": case.seed}
    if rival and case.method == "llama.cpp":
        return dense, rival.quantized(model.folder, dense, case.setting, scratch / "gguf", **text), {}
    if case.method in ("rtn", "gptq"):
        bits, group = (int(part) for part in case.setting.split(" g"))
        quantize_model(model.folder, dense, case.method, bits, group, **text)
        return dense, bits_of(bits, group), {}
    more: dict[str, float] = {}
    if case.method.startswith("quantize"):
        bits, _, matched = case.setting.partition(" ")
        run |= {"match_steps": MATCH_STEPS if matched else 0, "group": case.method.partition("-")[2] or "row"}
        report = llmsparse.quantize(str(model.folder), output=str(out), bits=float(bits), **run)
        more = {"entropy": report.stored()["entropy"], "zeros": report.stored()["zeros"]}
    else:
        sparsity, _, matched = case.setting.partition(" ")
        steps = MATCH_STEPS if matched else 0
        mask = {"sparsity": float(sparsity), "match_steps": steps}
        llmsparse.prune(str(model.folder), output=str(scratch / "mask"), **mask, **run)
        if case.method == "mask":
            llmsparse.pack(str(scratch / "mask"), out)
        else:
            group = {"mask-int8": "row", "mask-int4": min(GROUPS[model.name])}[case.method]
            kind = {"values": case.method.removeprefix("mask-"), "group": group}
            llmsparse.quantize(str(scratch / "mask"), output=str(out), **kind, **run)
    packed = PackedCheckpoint(out)
    stored = 8 * sum(packed.stored_bytes(name) for name in packed.layers)
    numel = sum(math.prod(described["shape"]) for described in packed.layers.values())
    llmsparse.unpack(str(out), dense)
    return dense, stored / numel, more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", default=",".join(GROUPS))
    parser.add_argument("--only", default="", help="methods that begin so")
    parser.add_argument("--llama-cpp", type=Path, help="its source tree; without it, its kinds are left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[Case, Result] = {}
    if RESULTS.exists():
        for row in csv.DictReader(RESULTS.open(encoding="utf-8")):
            case = Case(row["model"], row["method"], row["setting"], int(row["seed"]))
            numbers = {key: float(row[key]) if row[key] else None for key in ("entropy", "zeros")}
            known = {key: float(row[key]) for key in ("bits", "perplexity", "loss")}
            rows[case] = Result(**asdict(case), **known, **numbers)
    with tempfile.TemporaryDirectory() as folder:
        rival = LlamaCpp(options.llama_cpp.resolve(), Path(folder)) if options.llama_cpp else None
        for model in models(options.data, Path(folder)):
            if model.name not in options.models.split(","):
                continue
            for case in cases(model.name):
                if case in rows or not case.method.startswith((options.only, "dense")):
                    continue
                if case.method == "llama.cpp" and rival is None:
                    continue
                scratch = Path(folder) / "case"
                shutil.rmtree(scratch, ignore_errors=True)
                dense, bits, more = make(case, model, scratch, rival)
                found = llmsparse.perplexity(
                    dense, model.evaluation, seq_len=model.seq_len, windows=WINDOWS, device="cpu", dtype="float32"
                ).perplexity
                before = found if case.method == "dense" else rows[Case(model.name, "dense", "", 0)].perplexity
                rows[case] = Result(**asdict(case), bits=bits, perplexity=found, loss=math.log(found / before), **more)
                print(rows[case], flush=True)
                write(rows)


def write(rows: dict[Case, Result]) -> None:
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        for result in rows.values():
            spelled = {
                key: f"{value:.4f}" if isinstance(value, float) else value for key, value in asdict(result).items()
            }
            writer.writerow(spelled)


if __name__ == "__main__":
    main()
