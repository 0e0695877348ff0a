"""What leaving inputs out costs, and what it saves.

`python -m eval.activations DATA [--models NAME,…] [--decode FOLDER]` writes eval/results/activations.csv row by row; what is there
already is not made again. Models are the embedded one and `babyllama-tok361` of DATA/models, calibrated on 16 windows of 256 tokens
(Python's standard library; three quarters of DATA/data/tinystories.txt) and measured on others of the same text.

    sparsity    share of the inputs of all linear layers in blocks that is left out
    score       wina, teal; topk: so many of every token by wina's score
    bias        centre: inputs left out count as their median; fold: what is lost on average is added; none
    weights     zeros of the weights, by SparseGPT; a `sparsity` of 0 is these alone
    matching    steps that tune pruned blocks before inputs are left out
    bits        read for a token, a weight, of 16: masks of packed weights counted
    ratio       perplexity over that of the dense model

`--decode FOLDER` measures instead CPU milliseconds of a token on the models of `eval.decoding` in FOLDER (made there if need be), with
and without half of the inputs left out, to eval/results/activations_decoding.csv; each in a process of its own, by turns.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

import llmsparse
from eval.cpu_speed import cpu_name
from eval.end_to_end import build
from llmsparse.backends.choice import AUTO
from llmsparse.inference.decode import decode
from llmsparse.inference.load import load_model
from llmsparse.models.origin import BUILTIN_FOLDER

HERE = Path(__file__).parent
RESULTS, DECODING = (HERE / "results" / f"{name}.csv" for name in ("activations", "activations_decoding"))
RUN: dict[str, Any] = {"calibration_samples": 16, "seq_len": 256, "device": "cpu", "dtype": "float32"}
SPARSITIES = (0.5, 0.4, 0.25, 0.6)


@dataclass(frozen=True)
class Case:
    """One point."""

    model: str
    sparsity: float
    score: str = "wina"
    allocation: str = "greedy"
    bias: str = "centre"
    weights: float = 0.0
    matching: int = 0


@dataclass(frozen=True)
class Result(Case):
    """A row of the table."""

    bits: float = 16.0
    perplexity: float = 0.0
    ratio: float = 1.0


def cases(model: str) -> Iterator[Case]:
    """What matters most first; all of it at one half, and at other shares the plainest and the best."""
    yield from (
        Case(model, 0.5),
        Case(model, 0.5, "wina", "uniform", "none"),
        Case(model, 0.5, "wina", "greedy", "none"),
    )
    yield from (Case(model, 0.0, weights=0.7), Case(model, 0.5, weights=0.5), Case(model, 0.0, weights=0.5))
    yield Case(model, 0.5, weights=0.5, matching=60)
    for sparsity in SPARSITIES:
        yield from (Case(model, sparsity), Case(model, sparsity, "wina", "uniform", "none"))
    for score, bias in product(("wina", "teal", "topk"), ("none", "fold", "centre")):
        yield Case(model, 0.5, score, "uniform", bias)
    for sparsity in SPARSITIES:
        for score in ("teal", "topk"):
            yield Case(model, sparsity, score, "uniform", "none")
    for score, bias in (("teal", "centre"), ("teal", "none"), ("topk", "centre"), ("wina", "fold")):
        yield Case(model, 0.5, score, "greedy", bias)


def measure(case: Case, folder: Path, calibration: str, dense: float | None, scratch: Path) -> tuple[Result, float]:
    """A row, and the perplexity of the dense model on the same windows."""
    source = folder
    run: dict[str, Any] = RUN | {"calibration": calibration}
    bits, found = 16.0, dict[str, Any]()
    if case.weights:
        source = scratch / "pruned"
        how: dict[str, Any] = {"sparsity": case.weights, "match_steps": case.matching}
        report = llmsparse.prune(folder, output=source, overwrite=True, **how, **run)
        bits, found = 16 * (1 - case.weights) + 1, report.perplexity or found
    before: float = found.get("before", dense)
    if case.sparsity:
        rule: dict[str, Any] = {"score": "wina", "rule": "topk"} if case.score == "topk" else {"score": case.score}
        keys: dict[str, Any] = {"sparsity": case.sparsity, "allocation": case.allocation, "bias": case.bias}
        cut = llmsparse.activations(source, output=scratch / "cut", overwrite=True, **keys, **rule, **run)
        assert cut.perplexity is not None
        found, bits = cut.perplexity, bits * (1 - case.sparsity)
        before = before if case.weights else found["before"]
    after: float = found["after"]
    return Result(*astuple(case), bits=bits, perplexity=after, ratio=after / before), before


def quality(data: Path, chosen: list[str]) -> None:
    torch.set_num_threads(1)
    rows: list[Result] = []
    if RESULTS.exists():
        known: dict[str, Any] = {"float": float, "int": int}
        kinds = {field.name: known.get(str(field.type), str) for field in fields(Result)}
        with RESULTS.open(encoding="utf-8") as file:
            rows = [Result(**{key: kinds[key](value) for key, value in row.items()}) for row in csv.DictReader(file)]
    done = {Case(*(getattr(row, field.name) for field in fields(Case))) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        story = (data / "data" / "tinystories.txt").read_text(encoding="utf-8")
        (scratch / "stories.txt").write_text(story[: 3 * len(story) // 4], encoding="utf-8")
        places = {
            "babyllama": (data / "models" / "babyllama-tok361", str(scratch / "stories.txt")),
            "embedded": (BUILTIN_FOLDER, "builtin"),
        }
        for name in chosen:
            dense: float | None = None
            for case in cases(name):
                if case in done:
                    continue
                done.add(case)
                row, dense = measure(case, *places[name], dense, scratch)
                rows.append(row)
                print(*(f"{key} {value}" for key, value in asdict(row).items()), flush=True)
                with RESULTS.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, [field.name for field in fields(Result)])
                    writer.writeheader()
                    writer.writerows(
                        {
                            key: round(value, 4) if isinstance(value, float) else value
                            for key, value in asdict(one).items()
                        }
                        for one in rows
                    )


def child(folder: Path, backend: str, tokens: int) -> None:
    """One model in a process of its own: prints its figures as JSON."""
    model = load_model(folder, backend=backend, device=torch.device("cpu"))
    model.generation_config.eos_token_id = None
    ids = (torch.arange(16) % 1000)[None]
    stamps: list[float] = []
    for number, _ in enumerate(decode(model, ids, tokens + 3)):
        if number >= 2:
            stamps.append(time.process_time())
    print(json.dumps([1e3 * (now - before) for before, now in pairwise(stamps)]))


def decoding(folder: Path, tokens: int, repeats: int) -> None:
    """Dense and packed, with and without half of the inputs left out."""
    if not (folder / "packed").is_dir():
        build(folder)
    run: dict[str, Any] = {"sparsity": 0.5, "allocation": "uniform", "bias": "none", "calibration_samples": 2}
    run |= {"calibration": str(folder / "tokens.safetensors"), "device": "cpu"}
    for name in ("pruned", "packed"):
        if not (folder / f"{name}-cut").is_dir():
            llmsparse.activations(folder / name, output=folder / f"{name}-cut", **run)
    who = {
        "dense torch bf16": ("pruned", AUTO),
        "dense": ("packed", "cpu-dense"),
        "dense, half of the inputs": ("pruned-cut", AUTO),
        "packed 70 %": ("packed", AUTO),
        "packed 70 %, half of the inputs": ("packed-cut", AUTO),
    }
    times: dict[str, list[float]] = {name: [] for name in who}
    for _ in range(repeats):
        for name, (part, backend) in who.items():
            command = [sys.executable, "-m", "eval.activations", ".", "--tokens", str(tokens)]
            command += ["--child", str(folder / part), "--backend", backend]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            times[name] += json.loads(done.stdout.splitlines()[-1])
    with DECODING.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("date", "cpu", "torch", "threads", "who", "tokens", "cpu_ms", "cpu_ms_min"))
        for name, found in times.items():
            about = (time.strftime("%Y-%m-%d"), cpu_name(), torch.__version__, 1)
            row = (*about, name, len(found), f"{statistics.median(found):.2f}", f"{min(found):.2f}")
            writer.writerow(row)
            print(*row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", default="babyllama,embedded")
    parser.add_argument("--decode", type=Path, metavar="FOLDER")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", type=Path)
    parser.add_argument("--backend", default=AUTO)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.backend, options.tokens)
    if options.decode:
        return decoding(options.decode, options.tokens, options.repeats)
    quality(options.data, options.models.split(","))


if __name__ == "__main__":
    main()
