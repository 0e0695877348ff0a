"""Seconds and peak memory of every method, beside a plain loop of the published algorithm in the same run.

`python -m eval.speed [--device cpu|cuda] [--methods a,b] [--repeats 3]` builds a synthetic checkpoint of real shapes,
prunes it by turns with llmsparse and with `eval.published`, each in a process of its own, and appends median and spread
to eval/results/speed.csv. Whole-model figures are extrapolated from these blocks, and labelled so. Block matching is off.

    cpu    2 blocks of Llama-3.2-1B (2048 / 8192), 16 × 512 tokens
    cuda   4 blocks of Llama-3-8B (4096 / 14336), 128 × 2048 tokens
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "speed.csv"


@dataclass(frozen=True)
class Shape:
    """A model's shape, cut down to a few blocks and a small vocabulary."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    blocks: int
    whole: int  # blocks of the real model
    windows: int
    tokens: int


SHAPES = {
    "cpu": Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 2, 16, 16, 512),
    "cuda": Shape("Llama-3-8B", 4096, 14336, 32, 8, 4, 32, 128, 2048),
}


def build(shape: Shape, folder: Path) -> None:
    """Random bf16 weights, and random tokens beside them."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=1024,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    save_file({"input_ids": torch.randint(0, 1024, (shape.windows, shape.tokens))}, folder / "tokens.safetensors")


def run_once(who: str, method: str, folder: Path, device: str) -> dict[str, float]:
    """One timed run in a fresh process, the imports not counted."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    arguments = [sys.executable, "-m", "eval.speed", "--child", who, method, str(folder), device]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(who: str, method: str, folder: Path, device: str) -> None:
    """What runs in that process: prints seconds and peak bytes as JSON."""
    from safetensors.torch import load_file

    import llmsparse
    from eval import published
    from llmsparse.runs.device import choose_device
    from llmsparse.runs.memory import PeakMemory

    place = choose_device(device)
    ids = load_file(folder / "tokens.safetensors")["input_ids"]
    llmsparse.prune  # noqa: B018 (imports what it needs before the clock starts)
    with PeakMemory(place) as memory:
        started = time.perf_counter()
        if who == "published":
            published.prune_model(folder / "model", folder / "out", ids, method, 0.5, place)
        else:
            llmsparse.prune(
                model=str(folder / "model"),
                output=str(folder / "out"),
                method=method,
                sparsity=0.5,
                calibration=str(folder / "tokens.safetensors"),
                match_steps=0,
                device=str(place),
            )
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "bytes": memory.bytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", default="magnitude,wanda,sparsegpt,alps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=4)
    options = parser.parse_args()
    if options.child:
        who, method, folder, device = options.child
        child(who, method, Path(folder), device)
        return

    shape = SHAPES[options.device.partition(":")[0]]
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                ["device", "threads", "torch", "shape", "blocks", "tokens", "method", "who", "median_s", "min_s", "max_s",
                 "peak_mb", "ratio_to_published", "whole_model_s_extrapolated"]
            )  # fmt: skip
        build(shape, Path(scratch))
        for method in options.methods.split(","):
            runs: dict[str, list[dict[str, float]]] = {"published": [], "llmsparse": []}
            for _ in range(options.repeats):
                for who, results in runs.items():  # interleaved, so that a slow moment of the machine hits both
                    results.append(run_once(who, method, Path(scratch), options.device))
            medians = {who: statistics.median(run["seconds"] for run in results) for who, results in runs.items()}
            for who, results in runs.items():
                seconds = [run["seconds"] for run in results]
                peak = max(run["bytes"] for run in results) / 1e6
                ratio = medians[who] / medians["published"]
                whole = medians[who] * shape.whole / shape.blocks
                writer.writerow(
                    [name, torch.get_num_threads(), torch.__version__, shape.name, shape.blocks,
                     shape.windows * shape.tokens, method, who, f"{medians[who]:.2f}", f"{min(seconds):.2f}",
                     f"{max(seconds):.2f}", f"{peak:.0f}", f"{ratio:.3f}", f"{whole:.0f}"]
                )  # fmt: skip
                print(f"{method:10s} {who:10s} {medians[who]:8.2f} s  {peak:7.0f} MB  ratio {ratio:.2f}", flush=True)
            file.flush()


if __name__ == "__main__":
    main()
