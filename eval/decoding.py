"""Milliseconds of a token at batch 1: a packed model, the same dense by torch, and llama.cpp's kinds, in the same run.

`python -m eval.decoding [--threads 1,2] [--prompts 16,512] [--tokens 32] [--repeats 3] [--folder DIR] [--llama-cpp DIR]
[--realtime]` builds the model of `eval.end_to_end` (a Llama-3.2-1B shape, 70 % zeros by magnitude), and writes
eval/results/decoding.csv. `--llama-cpp` is llama.cpp's source tree with its libraries built in build/bin; without it its
rows are missing.

    packed              as `llmsparse generate` decodes, backend auto
    packed, generate    the same model by transformers' generate
    dense torch         transformers in bf16, weights on 2 MB pages as ours
    llama.cpp           bf16, Q8_0 and Q4_K_M of the same weights, by its own library

Each run is a process of its own, by turns. cpu_ms is time of the CPU by all threads, which others on the machine disturb
least; ms is the clock's. With two threads a thread that waits counts as working, so there the clock is what says something.
`--realtime` runs each by `chrt -f 20`, before all others.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.cpu_speed import cpu_name
from eval.end_to_end import build, pss_bytes
from eval.llama_cpp import LlamaCpp
from llmsparse.backends.cpu import pages
from llmsparse.inference.decode import decode

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "decoding.csv"
KINDS = ("bf16", "Q8_0", "Q4_K_M")
OURS, GENERATE, DENSE = "packed 70 %", "packed 70 %, generate", "dense torch bf16"
COLUMNS = [
    "date", "cpu", "torch", "transformers", "threads", "prompt", "who", "runs", "cpu_ms", "cpu_ms_min", "ms", "ms_min", "pss_mb",
    "prompt_ms", "same_tokens",
]  # fmt: skip


def child(who: str, folder: Path, prompt: int, tokens: int, backend: str) -> None:
    """One model of ours or of torch, in a process of its own: prints its figures as JSON."""
    from transformers import AutoModelForCausalLM

    from llmsparse import SparseConfig

    config = {} if who == DENSE else {"quantization_config": SparseConfig(backend=backend)}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **config)
    if who == DENSE:
        for parameter in model.parameters():
            parameter.data = pages.copy(parameter.data)
    model.generation_config.eos_token_id = (
        None  # as many tokens as are asked for, and no look at each whether it is the last
    )
    ids = (torch.arange(prompt) % 1000)[None]
    tokens_of(who, model, ids, 3)
    begun = time.perf_counter()
    stamps = tokens_of(who, model, ids, tokens)
    timed = [[now[0], 1e3 * (now[1] - before[1]), 1e3 * (now[2] - before[2])] for before, now in pairwise(stamps)]
    print(json.dumps({"prompt_ms": 1e3 * (stamps[0][1] - begun), "tokens": timed, "pss": pss_bytes()}))


def tokens_of(who: str, model: Any, ids: Tensor, tokens: int) -> list[tuple[int, float, float]]:
    """Each new token, and when it came: by the clock and by the CPU."""
    stamps: list[tuple[int, float, float]] = []

    class Clock:
        def put(self, value: Tensor) -> None:
            stamps.append((int(value.flatten()[-1]), time.perf_counter(), time.process_time()))

        def end(self) -> None:
            """Nothing is held back."""

    if who == OURS:
        for token in decode(model, ids, tokens):
            Clock().put(torch.tensor([token]))
        return stamps
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=tokens, streamer=Clock(), **options)
    return stamps[1:]  # the prompt comes first


class Rival:
    """llama.cpp's library, and the model in its kinds."""

    def __init__(self, source: Path, folder: Path, kinds: Sequence[str] = KINDS) -> None:
        self._tree, self._folder = LlamaCpp(source, folder), folder
        self._program = self._tree.built("llama_decode")
        if not self._file("bf16").exists():
            from eval.gguf_folder import write_gguf

            write_gguf(folder / "pruned", self._file("bf16"))
        for kind in kinds:
            if not self._file(kind).exists():
                self._tree.quantize(self._file("bf16"), self._file(kind), kind)

    def command(self, kind: str, prompt: int, tokens: int, threads: int) -> list[str]:
        numbers = (prompt, tokens, threads)
        return [str(self._program), str(self._file(kind)), *map(str, numbers), str(self._tree.libraries)]

    def _file(self, kind: str) -> Path:
        return self._folder / f"{kind}.gguf"


def run(command: list[str], threads: int, realtime: bool) -> dict[str, Any]:
    """What a process prints last."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    first = ["chrt", "-f", "20"] if realtime else []
    done = subprocess.run(
        [*first, *command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def summary(results: list[dict[str, Any]], ours: list[int]) -> dict[str, Any]:
    """Medians over the tokens of all runs, and the least; how many of our tokens it says too."""
    walls, cpus = ([token[place] for result in results for token in result["tokens"]] for place in (1, 2))
    said = [token[0] for token in results[0]["tokens"]]
    same = next((n for n, (a, b) in enumerate(zip(said, ours, strict=False)) if a != b), min(len(said), len(ours)))
    row = {
        "runs": len(results),
        "cpu_ms": statistics.median(cpus),
        "cpu_ms_min": min(cpus),
        "ms": statistics.median(walls),
        "ms_min": min(walls),
    }
    row["prompt_ms"] = statistics.median(result["prompt_ms"] for result in results)
    row = {key: f"{value:.2f}" if isinstance(value, float) else value for key, value in row.items()}
    pss = [result["pss"] for result in results if "pss" in result]
    return row | {"pss_mb": f"{statistics.median(pss) / 1e6:.0f}" if pss else "", "same_tokens": same}


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompts", default="16,512")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the models here, and use them again")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--child", nargs=4)
    parser.add_argument("--backend", default="auto", help="of a child")
    options = parser.parse_args()
    if options.child:
        who, folder, prompt, tokens = options.child
        return child(who, Path(folder), int(prompt), int(tokens), options.backend)
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = options.folder or Path(scratch)
        if not (folder / "packed").is_dir():
            build(folder)
        rival = Rival(options.llama_cpp.resolve(), folder) if options.llama_cpp else None
        about = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu_name() or platform.machine()}
        about |= {"torch": torch.__version__, "transformers": transformers.__version__}
        with RESULTS.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for threads, prompt in product(map(int, options.threads.split(",")), map(int, options.prompts.split(","))):
                commands = {
                    who: [
                        sys.executable,
                        "-m",
                        "eval.decoding",
                        "--child",
                        who,
                        str(folder / part),
                        str(prompt),
                        str(options.tokens),
                    ]
                    for who, part in ((OURS, "packed"), (GENERATE, "packed"), (DENSE, "pruned"))
                }
                if rival:
                    commands |= {
                        f"llama.cpp {kind}": rival.command(kind, prompt, options.tokens, threads) for kind in KINDS
                    }
                results: dict[str, list[dict[str, Any]]] = {who: [] for who in commands}
                for _ in range(options.repeats):
                    for who, command in commands.items():  # by turns, so that a slow moment of the machine hits all
                        results[who].append(run(command, threads, options.realtime))
                ours = [token[0] for token in results[OURS][0]["tokens"]]
                for who, found in results.items():
                    row = about | {"threads": threads, "prompt": prompt, "who": who} | summary(found, ours)
                    writer.writerow(row)
                    file.flush()
                    print(
                        f"{threads} threads, prompt {prompt}, {who}:",
                        *(f"{key} {row[key]}" for key in COLUMNS[7:]),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
