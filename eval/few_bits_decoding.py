"""Milliseconds of a token at batch 1 of a model in few bits beside llama.cpp's Q4_K_M, in the same run.

`python -m eval.few_bits_decoding [--llama-cpp DIR] [--bits 2.3] [--head-bits 8] [--threads 1,2] [--prompt 16] [--tokens 32]
[--repeats 3] [--folder DIR] [--realtime]` builds a random model of Llama-3.2-1B's shape with a head of its own, quantizes it
(nearest: its speed is the same) and writes eval/results/few_bits_decoding.csv, where rows of other bits and threads stay.
`--llama-cpp` as in `eval.decoding`, whose figures these are, by processes of their own that take turns; without it ours alone are
measured. `read_mb` are bytes that a token reads: all stored ones but those of the embedding, of which it reads a row.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import llmsparse
from eval.cpu_speed import cpu_name
from eval.decoding import OURS, Rival, run, summary
from eval.end_to_end import build_dense
from llmsparse.packing.folder import PackedCheckpoint

RESULTS = Path(__file__).parent / "results" / "few_bits_decoding.csv"
BACKENDS = {"exact": "auto", "8-bit activations": "cpu-nested-int8"}
KIND = "Q4_K_M"


def build(folder: Path, bits: float, head_bits: int) -> Path:
    """The quantized model; the dense one stays in `folder`/pruned, where llama.cpp's files are made from."""
    few = folder / f"few-{bits:g}-{head_bits}"
    if not (folder / "pruned").is_dir():
        build_dense(folder, tied=False)
        (folder / "model").rename(folder / "pruned")
    if not few.is_dir():
        keys: dict[str, Any] = {"bits": bits, "head_bits": head_bits, "method": "nearest", "rate": 0, "device": "cpu"}
        keys |= {"calibration": str(folder / "tokens.safetensors"), "calibration_samples": 1}
        llmsparse.quantize(str(folder / "pruned"), output=str(few), **keys)
    return few


def read_bytes(few: Path) -> int:
    packed = PackedCheckpoint(few)
    return sum(packed.stored_bytes(name) for name in packed.layers)


def gguf_bytes(file: Path) -> int:
    import gguf  # pyright: ignore[reportMissingImports]

    tensors: Any = gguf.GGUFReader(str(file)).tensors
    return sum(int(tensor.n_bytes) for tensor in tensors if tensor.name != "token_embd.weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--bits", type=float, default=2.3)
    parser.add_argument("--head-bits", type=int, default=8)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the models here, and use them again")
    parser.add_argument("--realtime", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = options.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        few = build(folder, options.bits, options.head_bits)
        rival = Rival(options.llama_cpp.resolve(), folder, (KIND,)) if options.llama_cpp else None
        read = dict.fromkeys(BACKENDS, read_bytes(few))
        if rival:
            read[KIND] = gguf_bytes(folder / f"{KIND}.gguf")
        rows: list[dict[str, Any]] = []
        for threads in map(int, options.threads.split(",")):
            about_child = [OURS, str(few), str(options.prompt), str(options.tokens)]
            commands = {
                who: [sys.executable, "-m", "eval.decoding", "--backend", backend, "--child", *about_child]
                for who, backend in BACKENDS.items()
            }
            if rival:
                commands[KIND] = rival.command(KIND, options.prompt, options.tokens, threads)
            results: dict[str, list[dict[str, Any]]] = {who: [] for who in commands}
            for _ in range(options.repeats):
                for who, command in commands.items():
                    results[who].append(run(command, threads, options.realtime))
            told = {who: summary(found, []) for who, found in results.items()}
            for who, row in told.items():
                about = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "torch": torch.__version__}
                about |= {"bits": options.bits, "head_bits": options.head_bits, "threads": threads, "who": who}
                row["times_cpu"] = f"{float(row['cpu_ms']) / float(told[KIND]['cpu_ms']):.2f}" if rival else ""
                row["read_mb"] = f"{read[who] / 1e6:.0f}"
                row["times_read"] = f"{read[who] / read[KIND]:.2f}" if rival else ""
                row = {key: value for key, value in row.items() if key not in ("same_tokens", "pss_mb")}
                rows.append(about | row)
                print(*(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """Beside those of other bits and threads that are there."""
    about = ("bits", "head_bits", "threads")
    new = {tuple(str(row[key]) for key in about) for row in rows}
    before = list(csv.DictReader(RESULTS.open(encoding="utf-8"))) if RESULTS.exists() else []
    kept = [row for row in before if tuple(row[key] for key in about) not in new]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


if __name__ == "__main__":
    main()
