"""What leaving inputs out saves in a layer of experts: CPU milliseconds of one token, one thread.

`python -m eval.activations_experts` writes eval/results/activations_experts.csv. The layer is of Qwen3-30B-A3B's shape with fewer
experts (2048 wide, 768 inside, 8 of 16 for a token), random, in bfloat16; the experts change from token to token.

    fused       the kernel that runs dense experts in one call
    half        half of the inputs of every matrix left out, which run expert by expert from columns
    none        the same with nothing left out
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from eval.cpu_speed import cpu_name
from llmsparse.inference.cut_experts import cut_experts, uncut_experts
from llmsparse.inference.fused_experts import run_experts
from llmsparse.models.experts import matrix_of_expert
from llmsparse.models.thresholds import Thresholds

RESULTS = Path(__file__).parent / "results" / "activations_experts.csv"
EXPERTS, CHOSEN, TOKENS = 16, 8, 40


def timed(run: Callable[[int], Tensor]) -> list[float]:
    found: list[float] = []
    for token in range(TOKENS):
        begun = time.process_time()
        run(token)
        found.append(1e3 * (time.process_time() - begun))
    return found[2:]


def medians(module: Any, x: Tensor) -> dict[str, list[float]]:
    """Thresholds that half of the scores of a token are below, by parameter and expert."""
    found: dict[str, list[float]] = {"gate_up_proj": [], "down_proj": []}
    for expert in range(EXPERTS):
        up, down = (matrix_of_expert(module, leaf, expert) for leaf in found)
        inner = module._apply_gate(torch.nn.functional.linear(x, up))
        for leaf, weight, entering in (("gate_up_proj", up, x), ("down_proj", down, inner)):
            found[leaf].append((entering.float().abs() * weight.float().norm(dim=0)).median().item())
    return found


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config: Any = Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=EXPERTS, num_experts_per_tok=CHOSEN
    )
    module: Any = Qwen3MoeExperts(config).to(torch.bfloat16)
    for parameter in module.parameters():
        parameter.requires_grad_(False).normal_(0, 0.02)
    x = torch.randn(1, 2048, dtype=torch.bfloat16)
    index = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(TOKENS)])
    shares = torch.full((1, CHOSEN), 1 / CHOSEN)
    half = medians(module, x)
    times = {"fused": timed(lambda token: run_experts(module, x, index[token, None], shares))}  # pyright: ignore[reportArgumentType]
    for name, thresholds in (("half", half), ("none", dict.fromkeys(half, [-1.0] * EXPERTS))):
        rules = {leaf: {"threshold": found} for leaf, found in thresholds.items()}
        uncut_experts(module)
        for leaf in rules:
            cut_experts(module, leaf, leaf, Thresholds("wina", "none", 0.5, rules))
        times[name] = timed(lambda token: module(x, index[token, None], shares))
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("date", "cpu", "torch", "threads", "who", "cpu_ms", "cpu_ms_min"))
        for name, found in times.items():
            row = (time.strftime("%Y-%m-%d"), cpu_name(), torch.__version__, 1, name)
            writer.writerow((*row, f"{statistics.median(found):.2f}", f"{min(found):.2f}"))
            print(name, statistics.median(found), min(found))


if __name__ == "__main__":
    main()
