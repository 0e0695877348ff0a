"""Measure the mixtures of a model: all of a block's FFN, router included, by each implementation of experts, beside a
dense FFN of as many neurons.

The input is what the model gives its own blocks for random text, so that its router chooses as it was trained to.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from llmsparse.benchmark.report import DENSE, MixtureMeasured, Speed, Speeds
from llmsparse.benchmark.timing import Call, cache_bytes, copies_for, side_by_side
from llmsparse.inference.experts_interface import run_by
from llmsparse.inference.fused_experts import NAME, most_tokens, why_not
from llmsparse.inference.packed_experts import CUT
from llmsparse.models.empty_model import build_empty
from llmsparse.models.origin import BUILTIN, load_config
from llmsparse.runs.device import DTYPES

STOCK = ("grouped_mm", "eager")
WAITS = "reads back what was chosen, which a CUDA graph cannot"
WINDOWS = 16  # of the random text, each as long as the largest batch


@dataclass(frozen=True)
class MixtureWorkload:
    """The FFN of a block that is a mixture, standing for `count`."""

    name: str
    count: int
    block: nn.Module
    experts: Any
    inputs: Tensor  # (tokens, width)

    @property
    def expert_bytes(self) -> int:
        """Of one routed expert."""
        weights = (self.experts.gate_up_proj, self.experts.down_proj)
        return sum(weight.nbytes for weight in weights) // len(self.experts.down_proj)

    @property
    def shared_bytes(self) -> int:
        """Of all else: what runs for every token, and the router."""
        stacked = {id(parameter) for parameter in self.experts.parameters()}
        return sum(p.nbytes for p in self.block.parameters() if id(p) not in stacked)

    @property
    def neurons(self) -> int:
        """Of all experts and the shared ones together."""
        downs = [getattr(one, "down_proj", None) for one in self.block.children()]
        shared = sum(down.in_features for down in downs if isinstance(down, nn.Linear))
        return self.experts.down_proj.shape[0] * self.experts.down_proj.shape[2] + shared


def mixtures(model: Any, tokens: int) -> list[MixtureWorkload]:
    """One for each shape among the blocks of a loaded model whose experts can run fused; `tokens`: of the largest batch."""
    found: dict[tuple[Any, ...], tuple[str, int]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "is_transposed") and CUT not in vars(module) and why_not(module) is None:
            parent = name.rpartition(".")[0]
            key = tuple((part, tuple(p.shape)) for part, p in model.get_submodule(parent).named_parameters())
            first, count = found.get(key, (parent, 0))
            found[key] = (first, count + 1)
    inputs = _inputs(model, [name for name, _ in found.values()], tokens)
    return [
        MixtureWorkload(name, count, model.get_submodule(name), _experts_of(model.get_submodule(name)), inputs[name])
        for name, count in found.values()
    ]


def time_mixture(
    mixture: MixtureWorkload, batches: Sequence[int], device: torch.device, bandwidth: float, seconds: float
) -> MixtureMeasured:
    """The mixture by each implementation and the dense FFN, by turns."""
    weight, cache = mixture.experts.down_proj, cache_bytes(device)
    width, names = weight.shape[1], (DENSE, *STOCK, NAME)
    dense_bytes = 3 * mixture.neurons * width * weight.element_size()
    most = most_tokens(device, weight.dtype)
    tables: list[Speeds] = []
    chosen: dict[int, float] = {}
    for batch in batches:
        x = mixture.inputs[: batch * WINDOWS].view(WINDOWS, batch, width)
        chosen[batch] = sum(_touched(mixture, one) for one in x) / WINDOWS
        read = {NAME: round(chosen[batch] * mixture.expert_bytes) + mixture.shared_bytes, DENSE: dense_bytes}
        refused = {NAME: f"for up to {most} at once"} if batch > most else {}
        refused |= {"eager": WAITS} if device.type == "cuda" else {}
        running = [name for name in names if name not in refused]
        calls = _calls(mixture, x, running, read, cache)
        times = side_by_side(calls, device, seconds)
        speeds = [
            Speed(
                name,
                taken,
                times[DENSE].median / taken.median,
                (size := read.get(name, read[NAME])) / taken.median / 1e9,
                size / taken.median / bandwidth,
                len(calls[name]) * size > 2 * cache,
            )
            for name, taken in times.items()
        ]
        tables.append(Speeds(batch, speeds, refused))
    experts, _, inner = weight.shape
    dtype = next(name for name, one in DTYPES.items() if one == weight.dtype)
    return MixtureMeasured(
        mixture.name, mixture.count, experts, inner, width, mixture.neurons, dtype, dense_bytes, chosen, tables
    )


def has_experts(folder: Path, trust_remote_code: bool) -> bool:
    """Whether transformers runs experts of this model through its interface; no weight is read."""
    config = load_config(folder, trust_remote_code)
    model = build_empty(config, torch.device("cpu"), torch.float32, trust_remote_code)
    return any(hasattr(module, "is_transposed") for module in model.modules())


def dense_source(folder: Path) -> str | None:
    """The dense model that a folder was factorized from, where it is at hand."""
    try:
        report = json.loads((folder / "llmsparse_report.json").read_bytes())
        model = str(report["model"]) if "container" in report else ""
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return model if model == BUILTIN or (model and (Path(model) / "config.json").is_file()) else None


def _calls(
    mixture: MixtureWorkload, x: Tensor, names: Sequence[str], read: dict[str, int], cache: int
) -> dict[str, list[Call]]:
    """x (windows, batch, width). Candidates start at copies of their own, so that none finds what another has read."""
    calls: dict[str, list[Call]] = {}
    copies = [copy.deepcopy(mixture.block) for _ in range(copies_for(read[NAME], cache))]
    for number, name in enumerate(name for name in names if name != DENSE):
        twins = [run_by(block, name) for block in copies]
        start = number * len(copies) // len(names)
        order = [*range(start, len(copies)), *range(start)]
        calls[name] = [partial(twins[at], x[at % len(x)].unsqueeze(1)) for at in order]
    width, weight = x.shape[-1], mixture.experts.down_proj
    dense: list[Call] = []
    for at in range(copies_for(read[DENSE], cache)):
        gate, up, down = (torch.randn_like(weight[0, :1, :1].expand(mixture.neurons, width)) for _ in range(3))
        dense.append(partial(_dense, gate, up, down.view(width, mixture.neurons), x[at % len(x)]))
    return {DENSE: dense} | calls


def _dense(gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def _experts_of(block: nn.Module) -> Any:
    return next(module for module in block.modules() if hasattr(module, "is_transposed"))


def _touched(mixture: MixtureWorkload, x: Tensor) -> int:
    """How many experts a batch (tokens, width) chooses."""
    chosen: list[Tensor] = []

    def look(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        chosen.append(arguments[1])  # (tokens, k)

    handle = mixture.experts.register_forward_pre_hook(look)
    with torch.inference_mode():
        mixture.block(x.unsqueeze(1))
    handle.remove()
    return len(chosen[0].unique())


def _inputs(model: Any, names: Sequence[str], tokens: int) -> dict[str, Tensor]:
    """What the blocks' FFNs are given for random text, in random order: name → (WINDOWS · tokens, width)."""
    found: dict[str, Tensor] = {}
    handles = [model.get_submodule(name).register_forward_pre_hook(partial(_keep_input, found, name)) for name in names]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (WINDOWS, tokens), generator=generator).to(model.device)
    with torch.inference_mode():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    order = torch.randperm(WINDOWS * tokens, generator=generator).to(model.device)
    return {name: x.reshape(-1, x.shape[-1])[order] for name, x in found.items()}


def _keep_input(found: dict[str, Tensor], name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
    found[name] = arguments[0]
