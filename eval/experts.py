"""Mixtures of experts at 25 % active beside a dense model of as many neurons, in the same run: first checked, then timed.

`python -m eval.experts [--dtypes float32,bfloat16] [--threads 1,2] [--batches 1,2,4,8] [--only ffn|decode] [--seconds 6]
[--shape note|llama-3-8b] [--device cpu|cuda] [--append]`

Random models of one shape (`note`: hidden 1024, FFN 5632, 8 layers, 16 and 8 heads, vocabulary 4096): a Llama, a Mixtral of
8 × 704 neurons with 2 active, a Glm4Moe with 2 shared and 2 of 14 active experts of 352. `ffn`: the FFNs of all layers,
router included, on random tokens; `decode`: a step of the whole model after 32 tokens. Candidates by turns, each call with
other tokens; every call reads more than the cache, and a dense one comes before it. Reported are the median and quartiles,
the ratio to dense torch of the same dtype, and GB/s of the FFN weights that a batch needs. `dense C` runs the dense FFN
through our own loop: what of the gain is a better loop than torch's, and not the experts. `quarter` is a dense FFN of a
quarter of the neurons: what routing and gathering cost is missing there.

Before anything is timed, the error of the fused FFN against float64 must be within 1.2 times that of transformers' own.
Writes eval/results/experts.csv. On a GPU: `ffn` alone, in CUDA graphs; never yet run on one. For quiet figures on a shared
machine: `taskset -c 1 chrt -r 1 python -m eval.experts …`, cell by cell with `--append`.
"""

from __future__ import annotations

import argparse
import csv
import os
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import llmsparse
from eval.cpu_speed import cpu_name
from llmsparse.backends.cpu.experts import gated
from llmsparse.benchmark.timing import Spread, side_by_side

RESULTS = Path(__file__).parent / "results" / "experts.csv"
SHAPES: dict[str, dict[str, int]] = {
    "note": {
        "hidden_size": 1024, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 4096,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 4096,
    },
}  # fmt: skip
PROMPT = 32
DRAWN = 64  # inputs, taken by turns
IMPLEMENTATIONS = ("grouped_mm", "eager", "llmsparse")
COLUMNS = [
    "device", "torch", "transformers", "threads", "load", "shape", "dtype", "what", "batch", "model", "run", "rounds",
    "median_ms", "p25_ms", "p75_ms", "min_ms", "experts_chosen", "gb_s", "times_dense", "min_times_dense",
]  # fmt: skip
Run = tuple[str, str]  # model, and what runs it


def dense_model(shape: dict[str, int], **changes: int) -> Any:
    return LlamaForCausalLM(LlamaConfig(**_common(shape) | changes))


def mixtral(shape: dict[str, int]) -> Any:
    inner = shape["intermediate_size"] // 8
    sizes = _common(shape) | {"intermediate_size": inner}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=2))


def glm4_moe(shape: dict[str, int]) -> Any:
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **_common(shape), moe_intermediate_size=shape["intermediate_size"] // 16, n_shared_experts=2,
            n_routed_experts=14, num_experts_per_tok=2, first_k_dense_replace=0, num_nextn_predict_layers=0,
            partial_rotary_factor=1.0,
        )
    )  # fmt: skip


def _common(shape: dict[str, int]) -> dict[str, Any]:
    head = shape["hidden_size"] // shape["num_attention_heads"]
    return shape | {"head_dim": head, "max_position_embeddings": 2048, "tie_word_embeddings": True}


def prepared(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """In its dtype, with routers that choose differently from token to token."""
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            nn.init.normal_(parameter, std=0.05)
    return model.to(device, dtype).eval().requires_grad_(False)


def by_each(model: Any) -> dict[str, Any]:
    """The model once for each implementation, with the same weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return {name: llmsparse.fuse(deepcopy(model, dict(shared)), name) for name in IMPLEMENTATIONS}


def ffn(model: Any, batch: int, draw: Callable[..., Tensor]) -> Callable[[], None]:
    xs = cycle([draw(batch, 1, model.config.hidden_size) for _ in range(DRAWN)])

    def run() -> None:
        x = next(xs)
        for layer in model.model.layers:
            layer.mlp(x)

    return run


def dense_loop(model: Any, batch: int, draw: Callable[..., Tensor]) -> Callable[[], None]:
    """The dense FFN by our kernel."""
    weights = [
        (m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight) for m in (la.mlp for la in model.model.layers)
    ]
    xs = cycle([draw(batch, model.config.hidden_size) for _ in range(DRAWN)])

    def run() -> None:
        x = next(xs)
        for gate, up, down in weights:
            gated(x, gate, up, down)

    return run


def step(model: Any, batch: int, generator: torch.Generator) -> Callable[[], None]:
    """One token after PROMPT others, which stay."""
    vocabulary = model.config.vocab_size
    with torch.inference_mode():
        ids = torch.randint(vocabulary, (batch, PROMPT), generator=generator)
        following = cycle([torch.randint(vocabulary, (batch, 1), generator=generator) for _ in range(DRAWN)])
        past = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def run() -> None:
        model(next(following), past_key_values=past, use_cache=True)
        past.crop(-1)

    return run


def check(name: str, runs: dict[str, Any], draw: Callable[..., Tensor]) -> None:
    """The first layer's FFN against float64."""
    x = draw(4, 1, runs["eager"].config.hidden_size)
    exact = runs["eager"].model.layers[0].mlp
    with torch.inference_mode():
        wanted = deepcopy(exact).double()(x.double())
        errors = {run: float((model.model.layers[0].mlp(x).double() - wanted).norm()) for run, model in runs.items()}
    assert errors["llmsparse"] <= 1.2 * errors["grouped_mm"], (name, errors)


def chosen(model: Any, batch: int, draw: Callable[..., Tensor], rounds: int = 16) -> float:
    """Routed experts of a layer that a batch chooses, on average."""
    counts: list[int] = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, given: counts.append(len(given[1].unique())))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        for _ in range(rounds):
            ffn(model, batch, draw)()
    for handle in handles:
        handle.remove()
    return sum(counts) / len(counts)


def ffn_bytes(model: Any, experts: float) -> float:
    """What a batch that chooses so many experts of each layer must read."""
    total = 0.0
    for layer in model.model.layers:
        for name, parameter in layer.mlp.named_parameters():
            share = experts / len(parameter) if name.startswith("experts.") else 1
            total += parameter.nbytes * share
    return total


def rows(
    times: Mapping[Run, Spread], about: dict[str, Any], models: dict[str, Any], touched: dict[str, float]
) -> list[dict[str, Any]]:
    """Lines of the csv."""
    dense = times["dense", "torch"]
    table: list[dict[str, Any]] = []
    for (name, run), taken in times.items():
        row = about | {"model": name, "run": run, "rounds": taken.rounds}
        row |= {"median_ms": f"{taken.median * 1e3:.3f}", "p25_ms": f"{taken.p25 * 1e3:.3f}"}
        row |= {"p75_ms": f"{taken.p75 * 1e3:.3f}", "min_ms": f"{taken.least * 1e3:.3f}"}
        row |= {"times_dense": f"{dense.median / taken.median:.2f}"}
        row |= {"min_times_dense": f"{dense.least / taken.least:.2f}"}
        if name in touched:
            row["experts_chosen"] = f"{touched[name]:.2f}"
        if about["what"] == "ffn":
            row["gb_s"] = f"{ffn_bytes(models[name], touched.get(name, 0)) / taken.median / 1e9:.1f}"
        table.append(row)
    return table


def measure(options: argparse.Namespace, dtype_name: str, write: Callable[[list[dict[str, Any]]], None]) -> None:
    """All cells of a dtype."""
    device, dtype, shape = torch.device(options.device), getattr(torch, dtype_name), SHAPES[options.shape]
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    models = {
        "dense": dense_model(shape),
        "quarter": dense_model(shape, intermediate_size=shape["intermediate_size"] // 4),
        "mixtral": mixtral(shape),
        "glm4_moe": glm4_moe(shape),
    }
    models = {name: prepared(model, dtype, device) for name, model in models.items()}
    mixed = {name: by_each(models[name]) for name in ("mixtral", "glm4_moe")}
    for name, runs in mixed.items():
        check(name, runs, draw)
    for what, threads, batch in product(options.only, options.threads, options.batches):
        torch.set_num_threads(threads)
        candidates: dict[Run, Callable[[], object]] = {}
        everything = {("dense", "torch"): models["dense"], ("quarter", "torch"): models["quarter"]}
        everything |= {(name, run): model for name, runs in mixed.items() for run, model in runs.items()}
        if device.type != "cpu":  # eager experts wait for the host, which a CUDA graph cannot
            everything = {key: model for key, model in everything.items() if key[1] != "eager"}
        for key, model in everything.items():
            candidates[key] = ffn(model, batch, draw) if what == "ffn" else step(model, batch, generator)
        if what == "ffn" and device.type == "cpu":
            candidates["dense", "C"] = dense_loop(models["dense"], batch, draw)
        touched = {name: chosen(models[name], batch, draw) for name in mixed}
        repeats = 1 if device.type == "cpu" else 8  # in a graph, each with inputs of its own
        times = side_by_side({key: [call] * repeats for key, call in candidates.items()}, device, options.seconds)
        about = {
            "device": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
            "torch": torch.__version__, "transformers": transformers.__version__, "threads": threads,
            "load": f"{os.getloadavg()[0]:.1f}", "shape": options.shape, "dtype": dtype_name, "what": what, "batch": batch,
        }  # fmt: skip
        table = rows(times, about, models, touched)
        write(table)
        figures = [f"{row['model']} {row['run']} {row['median_ms']} ms × {row['times_dense']}" for row in table]
        print(f"{dtype_name} {what} batch {batch} threads {threads}: {'; '.join(figures)}", flush=True)


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16", type=lambda text: text.split(","))
    parser.add_argument("--threads", default="1,2", type=numbers)
    parser.add_argument("--batches", default="1,2,4,8", type=numbers)
    parser.add_argument("--only", default="ffn,decode", type=lambda text: text.split(","))
    parser.add_argument("--seconds", type=float, default=6, help="for each cell")
    parser.add_argument("--shape", default="note", choices=SHAPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--append", action="store_true", help="add to the file in place of writing it anew")
    options = parser.parse_args()
    if options.device != "cpu":
        options.only, options.threads = ["ffn"], options.threads[:1]
    return options


def main() -> None:
    options = parse()
    warnings.simplefilter("error")  # a candidate that does not run as it is called would warn
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    RESULTS.parent.mkdir(exist_ok=True)
    fresh = not (options.append and RESULTS.exists())
    with RESULTS.open("w" if fresh else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()

        def write(table: list[dict[str, Any]]) -> None:
            writer.writerows(table)
            file.flush()

        for dtype in options.dtypes:
            measure(options, dtype, write)


if __name__ == "__main__":
    main()
