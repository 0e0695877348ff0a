"""Decode tokens a second at batch 1: vLLM with a dense model, vLLM with the same one packed, and llmsparse's own decoding of it.

`.venv-vllm/bin/python -m eval.vllm_decoding [--threads 1] [--prompt 16] [--tokens 32] [--repeats 3] [--folder DIR] [--eager]
[--blocks 16]` builds a random model of Llama-3.2-1B's shape, with 70 % zeros at random and a vocabulary of 32000, and
appends to eval/results/vllm.csv. Each run is a process of its own, by turns; vLLM runs its engine inside it, with compiled
graphs unless told `--eager`. cpu_ms is time of the CPU by all threads, which others on the machine disturb least;
same_tokens counts how many first tokens of an answer are those of vLLM with the dense model.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eval.cpu_speed import cpu_name
from eval.end_to_end import pss_bytes

RESULTS = Path(__file__).parent / "results" / "vllm.csv"
DENSE, PACKED, OURS = "vllm dense", "vllm packed", "llmsparse packed"
FOLDERS = {DENSE: "pruned", PACKED: "packed", OURS: "packed"}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
SPARSITY = 0.7
Stamp = tuple[list[int], float, float]  # the tokens so far, the clock, the CPU's time


def build(folder: Path, blocks: int) -> None:
    """`folder`/pruned and `folder`/packed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import llmsparse

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64, "vocab_size": 32000}
    heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": blocks}
    torch.set_default_dtype(torch.bfloat16)
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True, dtype="bfloat16"))
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.masked_fill_(torch.rand(weight.shape) < SPARSITY, 0.0)
    model.save_pretrained(folder / "pruned")
    llmsparse.pack(str(folder / "pruned"), str(folder / "packed"))


def by_vllm(folder: Path, prompt: list[int], tokens: int, eager: bool) -> list[Stamp]:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 1024, "max_num_seqs": 1}
    engine: Any = LLM(model=str(folder), enforce_eager=eager, dtype="bfloat16", **options)
    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    stamps: list[Stamp] = []
    for attempt in ("warm", "timed"):
        stamps = []
        engine.llm_engine.add_request(attempt, {"prompt_token_ids": prompt}, asked)
        while engine.llm_engine.has_unfinished_requests():
            for found in engine.llm_engine.step():
                stamps.append((list(found.outputs[0].token_ids), time.perf_counter(), time.process_time()))
    return stamps


def by_us(folder: Path, prompt: list[int], tokens: int) -> list[Stamp]:
    from llmsparse.inference.decode import decode
    from llmsparse.inference.load import load_model

    model = load_model(folder, device=torch.device("cpu"))
    model.generation_config.eos_token_id = None
    said: list[int] = []
    stamps: list[Stamp] = []
    for length in (3, tokens):
        said.clear()
        stamps.clear()
        for token in decode(model, torch.tensor([prompt]), length):
            said.append(token)
            stamps.append((list(said), time.perf_counter(), time.process_time()))
    return stamps


def child(who: str, folder: Path, prompt: int, tokens: int, eager: bool) -> None:
    ids = [number % 1000 for number in range(prompt)]
    run = by_us(folder, ids, tokens) if who == OURS else by_vllm(folder, ids, tokens, eager)
    (before, begun, cpu), (said, ended, cpu_ended) = run[0], run[-1]
    new = len(said) - len(before)
    told = {"said": said, "ms": 1e3 * (ended - begun) / new, "cpu_ms": 1e3 * (cpu_ended - cpu) / new}
    print(json.dumps(told | {"pss_mb": round(pss_bytes() / 1e6)}))


def same_first(said: list[int], other: list[int]) -> int:
    return next((at for at, pair in enumerate(zip(said, other, strict=True)) if pair[0] != pair[1]), len(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the models here, and use them again")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--eager", action="store_true", help="no compiled graphs in vLLM")
    parser.add_argument("--child", choices=FOLDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, options.prompt, options.tokens, options.eager)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = options.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        if not (folder / "packed").is_dir():
            build(folder, options.blocks)
        environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(options.threads)}
        results: dict[str, list[dict[str, Any]]] = {who: [] for who in FOLDERS}
        for _ in range(options.repeats):
            for who, name in FOLDERS.items():
                command = [sys.executable, "-m", "eval.vllm_decoding", "--child", who, "--folder", str(folder / name)]
                command += ["--prompt", str(options.prompt), "--tokens", str(options.tokens)]
                done = subprocess.run(
                    command + ["--eager"] * options.eager,
                    env=environment,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
                results[who].append(json.loads(line))
        rows: list[dict[str, Any]] = []
        for who, found in results.items():
            ms, cpu_ms = (statistics.median(run[key] for run in found) for key in ("ms", "cpu_ms"))
            row: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "vllm": version("vllm-cpu")}
            row |= {
                "torch": torch.__version__,
                "threads": options.threads,
                "prompt": options.prompt,
                "eager": options.eager,
            }
            row |= {"who": who, "runs": len(found), "tokens_per_s": round(1e3 / ms, 2), "ms": round(ms, 2)}
            row |= {"ms_min": round(min(run["ms"] for run in found), 2), "cpu_ms": round(cpu_ms, 2)}
            row |= {
                "pss_mb": found[-1]["pss_mb"],
                "same_tokens": same_first(found[0]["said"], results[DENSE][0]["said"]),
            }
            rows.append(row)
            print(row)
        new = not RESULTS.exists()
        with RESULTS.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
