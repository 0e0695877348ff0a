"""Decoding and loading of a whole model, transformers' dense bf16 beside the packed one.

`python -m eval.end_to_end [--repeats 5] [--tokens 32] [--threads N] [--folder DIR]` builds a random model of
Llama-3.2-1B's shape, prunes its linear weights to 70 % by magnitude, packs it, and appends median and spread to
eval/results/end_to_end.csv. The two run by turns, each in a process of its own whose imports are done before the clock
starts, greedily at batch 1. The dense one is the pruned model with its zeros, and its process never imports llmsparse.

    tokens/s       of all tokens but the first
    memory         proportional set size of the process after the first token
    first token    seconds from the call of from_pretrained to the first token, the checkpoint out of the page cache

The aim: 1.5 × the tokens/s in 0.6 × the memory, and the first token no later.
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
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "end_to_end.csv"
SPARSITY = 0.7
PROMPT_TOKENS = 16
WHO = ("dense", "packed")


def build(folder: Path) -> None:
    """`folder`/pruned and `folder`/packed."""
    import llmsparse

    build_dense(folder)
    run: dict[str, Any] = {"method": "magnitude", "sparsity": SPARSITY, "match_steps": 0}
    tokens = str(folder / "tokens.safetensors")  # magnitude does not look at them
    llmsparse.prune(model=str(folder / "model"), output=str(folder / "pruned"), calibration=tokens, **run)
    llmsparse.pack(str(folder / "pruned"), str(folder / "packed"))


def build_dense(folder: Path, *, tied: bool = True) -> None:
    """`folder`/model, and `folder`/tokens.safetensors."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    torch.set_default_dtype(torch.float32)
    save_file({"input_ids": torch.randint(0, 128256, (2, PROMPT_TOKENS))}, folder / "tokens.safetensors")


def forget(folder: Path) -> None:
    """Put a folder's files out of the page cache."""
    for file in folder.iterdir():
        number = os.open(file, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def pss_bytes() -> int:
    """The proportional set size of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.memory = 0

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:  # the prompt comes first
            self.memory = pss_bytes()
            self.times[-1] = time.perf_counter()

    def end(self) -> None:
        """Nothing is held back."""


def child(who: str, folder: Path, backend: str, tokens: int) -> None:
    """What runs in a process of its own: prints its figures as JSON."""
    from transformers import (
        AutoModelForCausalLM,
        LlamaForCausalLM,  # noqa: F401 (loads what from_pretrained would)
    )

    options: dict[str, Any] = {"dtype": "auto"}
    if who == "packed":
        import llmsparse

        options["quantization_config"] = llmsparse.SparseConfig(backend=backend)
    clock = Clock()
    ids = torch.arange(PROMPT_TOKENS)[None]  # (1, tokens)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    first, last = clock.times[1], clock.times[-1]
    figures = {"tokens_per_second": (tokens - 1) / (last - first), "memory": clock.memory, "first": first - started}
    print(json.dumps({**figures, "threads": torch.get_num_threads()}))


def run_once(who: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One run in a fresh process, from a cold cache."""
    target = folder / ("packed" if who == "packed" else "pruned")
    forget(target)
    arguments = ["--child", who, str(target), "--backend", options.backend, "--tokens", str(options.tokens)]
    environment = dict(os.environ)
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    command = [sys.executable, "-m", "eval.end_to_end", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def report(runs: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """Append two lines to the results, and print them."""
    import transformers

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].partition(":")[2].strip() if names else "cpu"
    about = [
        time.strftime("%Y-%m-%d"),
        cpu,
        int(runs["dense"][0]["threads"]),
        torch.__version__,
        transformers.__version__,
    ]
    about += ["Llama-3.2-1B", "bfloat16", SPARSITY, options.tokens, options.repeats]
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    medians = {
        who: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for who, results in runs.items()
    }
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                ["date", "cpu", "threads", "torch", "transformers", "model", "dtype", "sparsity", "tokens", "repeats", "who",
                 "tokens_per_s", "tokens_per_s_min", "tokens_per_s_max", "speedup", "pss_mb", "memory_ratio",
                 "first_token_cold_s", "first_token_min_s", "first_token_max_s", "first_token_ratio"]
            )  # fmt: skip
        for who, results in runs.items():
            own, dense = medians[who], medians["dense"]
            speeds, firsts = ([run[key] for run in results] for key in ("tokens_per_second", "first"))
            ratios = [own[key] / dense[key] for key in ("tokens_per_second", "memory", "first")]
            name = who if who == "dense" else f"packed, {options.backend}"
            writer.writerow(
                [*about, name, f"{own['tokens_per_second']:.2f}", f"{min(speeds):.2f}", f"{max(speeds):.2f}",
                 f"{ratios[0]:.3f}", f"{own['memory'] / 1e6:.0f}", f"{ratios[1]:.3f}", f"{own['first']:.2f}",
                 f"{min(firsts):.2f}", f"{max(firsts):.2f}", f"{ratios[2]:.3f}"]
            )  # fmt: skip
            print(
                f"{name:22s} {own['tokens_per_second']:7.2f} tokens/s ({ratios[0]:.2f} ×)  {own['memory'] / 1e6:7.0f} MB "
                f"({ratios[1]:.2f} ×)  first token after {own['first']:6.2f} s ({ratios[2]:.2f} ×)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--backend", default="cpu-bitmask")
    parser.add_argument("--folder", type=Path, help="keep the models here, and use them again")
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], Path(options.child[1]), options.backend, options.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not (folder / "packed").is_dir():
            build(folder)
        runs: dict[str, list[dict[str, float]]] = {who: [] for who in WHO}
        for _ in range(options.repeats):
            for who, results in runs.items():  # by turns, so that a slow moment of the machine hits both
                results.append(run_once(who, folder, options))
                print(who, results[-1], file=sys.stderr, flush=True)
        report(runs, options)


if __name__ == "__main__":
    main()
