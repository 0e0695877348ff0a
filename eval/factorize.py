"""Perplexity after factorizing, without any training of the model: ours beside FactorLLM, CMoE and a greedy oracle.

`python -m eval.factorize MODEL TEXT [SEEDS]` writes eval/results/factorize.csv, one row for each method, active share
and seed (0,1,2): held-out perplexity over that of the dense model. Rows of the same model and seed are replaced.

Ours and FactorLLM's go through `llmsparse.factorize`. CMoE (arXiv 2502.04416, from its code) has a router that no
released architecture computes, and the oracle sees the outputs it chooses from: both run in memory here, on the same
calibration and held-out windows. FactorLLM is before its fine-tuning; `released` has the router its code ends up with,
which no loss reaches. CMoE's balanced assignment, exact in its code, is `clustering.assign` here.
"""

from __future__ import annotations

import csv
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.factorization.block import PROFILE_TOKENS, draw
from llmsparse.factorization.clustering import assign
from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.oracle import greedy
from llmsparse.factorization.plan import FactorizePlan, make_plan
from llmsparse.factorization.recipe import FactorizeRecipe
from llmsparse.factorization.refit import refit, routed_hidden
from llmsparse.factorization.router import expert_outputs, tokens_at_once, top
from llmsparse.factorization.split import Layout, Split, clustered
from llmsparse.ranks.group import ALONE
from llmsparse.ranks.share import Share

RESULTS = Path(__file__).parent / "results" / "factorize.csv"
WINDOWS, SEQ_LEN = 64, 256
SHARES = (50, 25, 75)
FACTORLLM = {75: 3, 50: 2, 25: 1}  # active of its 4 experts
MARKED = 10  # neurons that CMoE marks for a token, its K_a

PUBLIC: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, gate-mean router": {"router": "gate-mean"},
    "ours, no refit": {"refit": False},
    "FactorLLM released": {"split": "contiguous", "router": "random", "scale": "ratio", "refit": False},
    "FactorLLM, trained PA router": {"split": "contiguous", "router": "prior-approximate", "scale": "ratio", "refit": False},
}  # fmt: skip


class Gates:
    """Stands where a Router is wanted: any function from tokens to (tokens, routed) gates."""

    def __init__(self, gates: Callable[[Tensor], Tensor]) -> None:
        self.gates = gates


class Mixture(nn.Module):
    """An FFN whose hidden neurons are gated by expert."""

    def __init__(self, ffn: FFN, split: Split, router: Any) -> None:
        super().__init__()
        self.parts = (ffn, split, router)

    def forward(self, x: Tensor) -> Tensor:
        ffn, split, router = self.parts
        pieces = x.flatten(0, -2).split(tokens_at_once(ffn, split))
        return torch.cat([routed_hidden(ffn, split, router, part) @ ffn.down.T for part in pieces]).view_as(x)


@dataclass(frozen=True)
class Result:
    """One method at one active share and seed. `active_share` counts the neurons that run, padding left out."""

    model: str
    method: str
    percent: int
    seed: int
    active_share: float
    perplexity: float
    ratio: float


def layout_at(neurons: int, percent: int) -> Layout:
    """16 slots, or the fewest above that no padding is needed in; at most `percent` of them run, half of them shared."""
    experts = next(count for count in range(16, 64) if (layout := Layout(neurons, count, 1, 1)).width * count
                   < neurons + layout.multiple)  # fmt: skip
    running = int(percent / 100 * neurons / Layout(neurons, experts, 1, 1).width)
    return Layout(neurons, experts, running // 2, running - running // 2)


def by_oracle(ffn: FFN, layout: Layout, inputs: list[Tensor], generator: torch.Generator) -> tuple[Split, Any]:
    """Our split, and experts chosen by what they add."""
    some = draw(inputs, Share(ALONE, tuple((1, len(x)) for x in inputs)), PROFILE_TOKENS, generator)
    split = clustered(layout, ffn.loudness(some).T.contiguous(), generator)
    return split, Gates(lambda x: greedy(expert_outputs(ffn, split, x), layout.active).float())


def by_cmoe(ffn: FFN, layout: Layout, inputs: list[Tensor], generator: torch.Generator) -> tuple[Split, Any]:
    """CMoE: neurons by the rate at which they are among the largest of a token; experts by their representatives."""
    unit_gate, unit_up = F.normalize(ffn.gate, dim=1), F.normalize(ffn.up, dim=1)
    x = torch.cat(inputs)
    unit_x = F.normalize(x, dim=1)
    hidden = F.silu(unit_x @ unit_gate.T) * (unit_x @ unit_up.T)
    marks = top(hidden.abs(), MARKED).float()  # (tokens, neurons)
    order = marks.mean(0).argsort(descending=True, stable=True)
    shared, rest = order[: layout.shared_neurons], order[layout.shared_neurons :]
    points = marks[:, rest].T.contiguous()  # (neurons, tokens)
    centres = marks[:, rest[: layout.routed]].T  # those of the highest rates that are left
    labels = assign(torch.cdist(points, centres, p=1), layout.routed_sizes)
    members = [rest[labels == expert] for expert in range(layout.routed)]
    means = torch.stack([marks[:, one].mean(1) for one in members])
    first = [one[(marks[:, one].T - mean).abs().sum(1).argmin()] for one, mean in zip(members, means, strict=True)]
    speakers = torch.stack(first)

    def gates(x: Tensor) -> Tensor:
        unit = F.normalize(x, dim=1)
        score = (unit @ unit_up[speakers].T) * F.silu(unit @ unit_gate[speakers].T)
        return top(score.abs(), layout.active).float()

    return Split(shared, tuple(members)), Gates(gates)


IN_MEMORY: dict[str, tuple[Callable[..., tuple[Split, Any]], bool]] = {  # name → (split and router, refit)
    "CMoE": (by_cmoe, False),
    "oracle": (by_oracle, False),
    "oracle, refit": (by_oracle, True),
}


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    losses = [model(ids, labels=ids).loss * len(ids) for ids in windows.split(8)]
    return math.exp(float(torch.stack(losses).sum()) / len(windows))


@torch.no_grad()
def in_memory(plan: FactorizePlan, layout: Layout, method: str) -> float:
    """Perplexity on the held-out windows, each layer converted behind the ones before it."""
    model = AutoModelForCausalLM.from_pretrained(plan.folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(plan.recipe.seed)
    build, fits = IN_MEMORY[method]
    for layer in model.model.layers:
        inputs: list[Tensor] = []
        hook = layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))  # noqa: B023
        for ids in plan.windows.ids.split(16):
            model.model(ids)
        hook.remove()
        ffn = FFN(*(getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")))
        split, router = build(ffn, layout, inputs, generator)
        written = refit(ffn, ffn, split, router, inputs)[0] if fits else ffn
        layer.mlp = Mixture(written, split, router)
    return perplexity(model, plan.windows.held_out)


def sweep(model: str, text: str, seeds: list[int]) -> Iterator[Result]:
    name = Path(model).name
    with tempfile.TemporaryDirectory() as folder:
        common = {"model": model, "device": "cpu", "calibration_samples": WINDOWS, "output": str(Path(folder) / "out")}
        for seed in seeds:
            plan = make_plan(FactorizeRecipe(**common, calibration=text, seq_len=SEQ_LEN, seed=seed), overwrite=True)
            held_out, tokens = plan.windows.held_out, Path(folder) / "tokens.safetensors"
            save_file({"input_ids": torch.cat([plan.windows.ids, held_out])}, tokens)  # read once, the same for all
            dense = perplexity(AutoModelForCausalLM.from_pretrained(plan.folder, dtype=torch.float32), held_out)
            for percent in SHARES:
                layout = layout_at(plan.layout.neurons, percent)
                for method, options in PUBLIC.items():
                    theirs = method.startswith("FactorLLM")
                    used = Layout(layout.neurons, 4, 0, FACTORLLM[percent]) if theirs else layout
                    numbers = {"experts": used.experts, "shared": used.shared, "active": used.active}
                    report = llmsparse.factorize(
                        **common, **numbers, **options, calibration=str(tokens), seed=seed, overwrite=True
                    )
                    assert report.perplexity is not None
                    after = report.perplexity["after"]
                    yield Result(name, method, percent, seed, running(used), after, after / dense)
                for method in IN_MEMORY:
                    after = in_memory(plan, layout, method)
                    yield Result(name, method, percent, seed, running(layout), after, after / dense)


def running(layout: Layout) -> float:
    """Share of the neurons that run for a token, padding left out."""
    routed = sum(layout.routed_sizes) / layout.routed
    return (layout.shared_neurons + layout.active * routed) / layout.neurons


def main() -> None:
    model, text = sys.argv[1:3]
    seeds = [int(seed) for seed in (sys.argv[3] if len(sys.argv) > 3 else "0,1,2").split(",")]
    RESULTS.parent.mkdir(exist_ok=True)
    kept: list[list[str]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        kept = [row for row in rows if row[0] != Path(model).name or int(row[3]) not in seeds]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([list(Result.__dataclass_fields__), *kept])
        for result in sweep(model, text, seeds):
            writer.writerow([result.model, result.method, result.percent, result.seed, f"{result.active_share:.4f}",
                             f"{result.perplexity:.4f}", f"{result.ratio:.4f}"])  # fmt: skip
            file.flush()
            print(f"{result.method:30s} {result.percent:2d} %  seed {result.seed}  "
                  f"x{result.ratio:.4f}  ({result.active_share:.3f} of the neurons)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
