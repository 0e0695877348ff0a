"""Time that a prompt takes with packed weights, beside the same model dense.

`python -m eval.prefill [--prompts 32,128,512,2048] [--threads 1,2] [--rounds 9]` builds two blocks of Llama-3.2-1B's shape in
bf16 and appends to eval/results/prefill.csv:

    dense               by transformers
    70 %                a bit for each weight, and those that are left
    2:4                 the same
    2.5 bits            nested, nearest: the speed does not depend on how it is quantized

All take turns in one process, and ratios are of one turn; `over_dense` is their median, by the time of the CPU, which others on the
machine disturb least. Those that end in `_min` are of the least times: by the clock a median says little, since at real-time
priority (`chrt -r 5`) Linux takes 50 ms of each second away. With two threads a thread that waits counts as working.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import llmsparse
from eval.cpu_speed import cpu_name
from eval.table import append
from llmsparse.inference.load import load_model

RESULTS = Path(__file__).parent / "results" / "prefill.csv"
VOCABULARY = 1024  # a prompt's last token alone goes through the head


@torch.no_grad()
def build(folder: Path) -> dict[str, Any]:
    """Who → the model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    dense: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    linears = [
        one.weight for name, one in dense.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"
    ]
    kept = [weight.clone() for weight in linears]
    made: dict[str, Any] = {"dense": dense}

    def packed(who: str, zeros: Callable[[Tensor], Tensor]) -> None:
        for weight, before in zip(linears, kept, strict=True):
            weight.copy_(before.masked_fill(zeros(before), 0.0))
        dense.save_pretrained(folder / "pruned")
        llmsparse.pack(str(folder / "pruned"), folder / who)
        made[who] = load_model(folder / who, device=torch.device("cpu"))

    packed("70 %", lambda weight: torch.rand(weight.shape) < 0.7)
    packed("2:4", lambda weight: torch.rand(weight.numel() // 4, 4).argsort(1).view(weight.shape) < 2)
    for weight, before in zip(linears, kept, strict=True):
        weight.copy_(before)
    dense.save_pretrained(folder / "whole")
    from safetensors.torch import save_file

    save_file({"input_ids": torch.randint(0, VOCABULARY, (1, 64))}, folder / "ids.safetensors")
    llmsparse.quantize(
        str(folder / "whole"), bits=2.5, method="nearest", rate=0, output=folder / "few", device="cpu",
        calibration=str(folder / "ids.safetensors"), calibration_samples=1,
    )  # fmt: skip
    made["2.5 bits"] = load_model(folder / "few", device=torch.device("cpu"))
    return made


@torch.no_grad()
def timed(model: Any, ids: Tensor) -> tuple[float, float]:
    """Milliseconds of the CPU and of the clock."""
    begun = time.process_time(), time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return 1e3 * (time.process_time() - begun[0]), 1e3 * (time.perf_counter() - begun[1])


def compare(models: dict[str, Any], prompt: int, rounds: int, note: str) -> list[dict[str, Any]]:
    ids = (torch.arange(prompt) % VOCABULARY)[None]
    for model in models.values():
        timed(model, ids)
    found: dict[str, list[tuple[float, float]]] = {who: [] for who in models}
    for number in range(rounds):
        for who in list(models)[number % len(models) :] + list(models)[: number % len(models)]:
            found[who].append(timed(models[who], ids))
    rows: list[dict[str, Any]] = []
    for who, times in found.items():
        ratios = [one[0] / base[0] for one, base in zip(times, found["dense"], strict=True)]
        rows.append(
            {
                "date": time.strftime("%Y-%m-%d"),
                "cpu": cpu_name(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "prompt": prompt,
                "who": who,
                "rounds": rounds,
                "cpu_ms": round(statistics.median(one[0] for one in times), 1),
                "cpu_ms_min": round(min(one[0] for one in times), 1),
                "ms_min": round(min(one[1] for one in times), 1),
                "over_dense": round(statistics.median(ratios), 3),
                "over_dense_min": round(min(one[0] for one in times) / min(one[0] for one in found["dense"]), 3),
                "over_dense_clock_min": round(min(one[1] for one in times) / min(one[1] for one in found["dense"]), 3),
                "note": note,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="32,128,512,2048")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--note", default="", help="of these rows, in the last column")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = build(Path(folder))
    rows: list[dict[str, Any]] = []
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        for prompt in map(int, arguments.prompts.split(",")):
            rows += compare(models, prompt, arguments.rounds, arguments.note)
            for row in rows[-len(models) :]:
                print(*(f"{key} {row[key]}" for key in list(row)[3:]), flush=True)
    if not arguments.dry:
        append(RESULTS, rows)


if __name__ == "__main__":
    main()
