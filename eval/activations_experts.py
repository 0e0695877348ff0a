"""What leaving inputs out saves in a layer of experts: CPU milliseconds of a token and of a prompt, one thread.

`python -m eval.activations_experts` writes eval/results/activations_experts.csv. The layer is of Qwen3-30B-A3B's shape with fewer
experts (2048 wide, 768 inside, 8 of 16 for a token), random, in bfloat16; the experts change from token to token.

    whole       dense experts: a few tokens by the kernel that runs them in one call, a prompt by torch's grouped products
    half        half of the inputs of every matrix left out, which run expert by expert, a few tokens from columns
    centre      the same with a centre and what it adds, as `llmsparse activations` makes them unless told otherwise
    none        as half, with nothing left out
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from eval.cpu_speed import cpu_name
from llmsparse.inference.cut_experts import cut_experts, uncut_experts
from llmsparse.inference.experts_interface import llmsparse_experts
from llmsparse.models.experts import matrix_of_expert
from llmsparse.models.thresholds import Thresholds

RESULTS = Path(__file__).parent / "results" / "activations_experts.csv"
EXPERTS, CHOSEN = 16, 8
RUNS = {1: 40, 128: 7}  # tokens at once → how often


def timed(run: Callable[[int], Tensor], count: int) -> list[float]:
    found: list[float] = []
    for number in range(count):
        begun = time.process_time()
        run(number)
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


def _one(run: Any, x: Tensor, index: Tensor, shares: Tensor, number: int) -> Tensor:
    return run(x, index[number], shares)


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
    x = {tokens: torch.randn(tokens, 2048, dtype=torch.bfloat16) for tokens in RUNS}
    index = {tokens: torch.rand(count, tokens, EXPERTS).topk(CHOSEN, dim=-1).indices for tokens, count in RUNS.items()}
    half = medians(module, x[1])
    never = dict.fromkeys(half, [-1.0] * EXPERTS)
    zeros = {leaf: torch.zeros(EXPERTS, matrix_of_expert(module, leaf, 0).shape[1]) for leaf in half}
    times: dict[tuple[str, int], list[float]] = {}

    def time_all(name: str, run: Any) -> None:
        for tokens, count in RUNS.items():
            shares = torch.full((tokens, CHOSEN), 1 / CHOSEN)
            times[name, tokens] = timed(partial(_one, run, x[tokens], index[tokens], shares), count)

    time_all("whole", partial(llmsparse_experts, module))
    for name, bias, thresholds in (("half", "none", half), ("centre", "centre", half), ("none", "none", never)):
        rules = {leaf: {"threshold": found} for leaf, found in thresholds.items()}
        uncut_experts(module)
        for leaf in rules:
            cut_experts(module, leaf, leaf, Thresholds("wina", bias, 0.5, rules, zeros if bias == "centre" else {}))
        time_all(name, module)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("date", "cpu", "torch", "threads", "who", "tokens", "cpu_ms", "cpu_ms_min"))
        for (name, tokens), found in times.items():
            row = (time.strftime("%Y-%m-%d"), cpu_name(), torch.__version__, 1, name, tokens)
            writer.writerow((*row, f"{statistics.median(found):.2f}", f"{min(found):.2f}"))
            print(name, tokens, statistics.median(found), min(found))


if __name__ == "__main__":
    main()
