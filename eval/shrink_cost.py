"""What taking experts out costs beside running them: seconds of the processor for a block, and for its plain forward.

    python -m eval.shrink_cost [--blocks 3] [--repeats 3] [--samples 64]

A random mixture of the shape of OLMoE-1B-7B (64 experts, 8 of them for a token, width 2048, bf16) on one thread, 64 windows of
512 tokens. `forward` runs every block on these once; `scores` measures its experts on the way; `shrink` halves them, in one
pass, then each block behind shrunk ones, which runs what was made too, without refit and with it. Reading and writing count
in all but `forward`. Rows go to eval/results/shrink_cost.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

import llmsparse
from llmsparse.models.empty_model import build_empty
from llmsparse.models.streamed import StreamedModel
from llmsparse.storage.checkpoint import CheckpointReader, CheckpointWriter

RESULTS = Path(__file__).parent / "results" / "shrink_cost.csv"
LENGTH, BATCH = 512, 4
SHAPE: dict[str, Any] = {
    "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 1024,
    "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 1024, "max_position_embeddings": LENGTH, "dtype": "bfloat16",
}  # fmt: skip


def write_mixture(folder: Path, blocks: int) -> Path:
    """Random weights of that shape, tensor by tensor."""
    config = CONFIG_MAPPING["olmoe"](**SHAPE, num_hidden_layers=blocks, architectures=["OlmoeForCausalLM"])
    folder.mkdir()
    config.save_pretrained(folder)
    empty = build_empty(config, torch.device("cpu"), torch.bfloat16, False)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    writer = CheckpointWriter(folder, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}, 2**40)
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.write({name: (0.02 * torch.randn(shape, generator=generator)).bfloat16()})
    writer.finish()
    return folder


def forward(folder: Path, ids: torch.Tensor) -> float:
    """Seconds of every block's own forward on all windows, after reading."""
    model = StreamedModel(CheckpointReader(folder), device=torch.device("cpu"), dtype=torch.bfloat16)
    acts = model.embed(list(ids.split(BATCH)))
    seconds = 0.0
    with torch.no_grad():
        for block in model.blocks():
            started = time.process_time()
            acts = block.run(acts)
            seconds += time.process_time() - started
    return seconds


def timed(work: Callable[[str], object], model: Path) -> float:
    started = time.process_time()
    work(str(model))
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch)
        few = write_mixture(room / "few", args.blocks)
        none = write_mixture(room / "one", 1)  # what a run costs beside its blocks
        ids = torch.randint(0, 1024, (args.samples, LENGTH), generator=torch.Generator().manual_seed(0))
        save_file({"input_ids": ids}, room / "tokens.safetensors")
        common: dict[str, Any] = {"calibration": str(room / "tokens.safetensors"), "calibration_samples": args.samples}
        common |= {"device": "cpu", "dtype": "bfloat16", "overwrite": True}
        halved = common | {"experts": "50%", "output": str(room / "half")}
        scored = common | {"output": str(room / "scores.safetensors")}
        runs: dict[str, Callable[[str], object]] = {
            "scores": lambda model: llmsparse.scores(model=model, **scored),
            "shrink, one pass": lambda model: llmsparse.shrink(model=model, refit=False, one_pass=True, **halved),
            "shrink": lambda model: llmsparse.shrink(model=model, refit=False, **halved),
            "shrink, refit": lambda model: llmsparse.shrink(model=model, refit=True, **halved),
        }
        for _ in range(args.repeats):
            seconds["forward"].append(forward(few, ids) / args.blocks)
            for kind, work in runs.items():
                whole, alone = timed(work, few), timed(work, none)
                seconds[kind].append((whole - alone) / (args.blocks - 1))
            print({kind: round(found[-1], 2) for kind, found in seconds.items()}, flush=True)
    plain = statistics.median(seconds["forward"])
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "tokens", "cpu_seconds_a_block", "least", "most", "times_forward"])
        for kind, found in seconds.items():
            middle = statistics.median(found)
            numbers = [f"{seconds_a_block:.2f}" for seconds_a_block in (middle, min(found), max(found))]
            writer.writerow([kind, ids.numel(), *numbers, f"{middle / plain:.2f}"])
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
