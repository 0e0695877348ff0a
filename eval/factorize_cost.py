"""What factorizing costs: seconds a block and peak memory, on synthetic checkpoints of real shapes.

`python -m eval.factorize_cost [--device cpu|cuda]` writes eval/results/factorize_cost.csv (16 experts, 4 shared, 4 active,
trained router and refit, all by default). Seconds a block are what the report says of making it; carrying activations on,
writing and measuring perplexity come on top. The whole model is extrapolated from the whole run, and labelled so.

    cpu    2 blocks of Llama-3.2-1B (2048 / 8192), 32 × 1024 tokens      aim: 16 blocks in 30 minutes on 2 cores
    cuda   2 blocks of Llama-3-8B (4096 / 14336), 128 × 2048 tokens      aim: a block in 20 s on an H200
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from pathlib import Path

import torch

import llmsparse
from eval.speed import Shape, build

RESULTS = Path(__file__).parent / "results" / "factorize_cost.csv"
SHAPES = {
    "cpu": Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 2, 16, 32, 1024),
    "cuda": Shape("Llama-3-8B", 4096, 14336, 32, 8, 2, 32, 128, 2048),
}
COLUMNS = (
    "device", "threads", "torch", "shape", "blocks", "tokens", "block_s", "block_s_max", "run_s",
    "whole_model_s_extrapolated", "peak_mb",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    shape = SHAPES[device]
    with tempfile.TemporaryDirectory(prefix="llmsparse-factorize-") as scratch:
        folder = Path(scratch)
        build(shape, folder)
        report = llmsparse.factorize(
            model=str(folder / "model"),
            output=str(folder / "out"),
            calibration=str(folder / "tokens.safetensors"),
            seq_len=shape.tokens,
            device=device,
        )
    timings = report.to_json()["timings"]
    blocks = list(timings["blocks"].values())
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    row = (
        where, torch.get_num_threads(), torch.__version__, shape.name, shape.blocks, shape.windows * shape.tokens,
        f"{statistics.median(blocks):.1f}", f"{max(blocks):.1f}", f"{timings['seconds']:.1f}",
        f"{timings['seconds'] / shape.blocks * shape.whole:.0f}", f"{timings['peak_memory_bytes'] / 1e6:.0f}",
    )  # fmt: skip
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(row)
    print(dict(zip(COLUMNS, row, strict=True)))


if __name__ == "__main__":
    main()
