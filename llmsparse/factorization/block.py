"""One block: what enters its FFN is recorded, the neurons are split, the router made, the experts fitted, all measured."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.factorization import export
from llmsparse.factorization.containers import Container
from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.oracle import Routing, routing_quality
from llmsparse.factorization.recipe import FactorizeRecipe
from llmsparse.factorization.refit import SCALES, refit, scaled
from llmsparse.factorization.router import ROUTERS, RouterTask, shipped
from llmsparse.factorization.split import SPLITS, Layout
from llmsparse.models.streamed import Activations, Block, Slot
from llmsparse.models.tap import Tap
from llmsparse.models.weight import Weight
from llmsparse.runs.run import Made
from llmsparse.runs.seeding import generator_for

PROFILE_TOKENS = 2**12  # that neurons are clustered by, and scales fitted on
ROUTER_TOKENS = 2**14  # that a router is trained on
MEASURED_TOKENS = 2**12  # that what routing captures is measured on


@dataclass(frozen=True)
class Target:
    """The FFN of one block, as the source stores it: its three weights, and the prefix of the block's keys."""

    gate: Weight
    up: Weight
    down: Weight
    prefix: str
    dtype: torch.dtype  # that the experts are written in

    @property
    def keys(self) -> set[str]:
        return {self.gate.key, self.up.key, self.down.key}


@dataclass(frozen=True)
class FactorizeOptions:
    """What the solver of a block is told, besides where its FFN lies."""

    recipe: FactorizeRecipe
    layout: Layout
    container: Container
    device: torch.device


@dataclass(frozen=True)
class LayerRecord:
    """What the journal keeps of a finished block."""

    name: str
    routing: Routing
    measured_on: str  # held-out or calibration
    notes: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> LayerRecord:
        routing = Routing(**(entry["routing"] | {"load": tuple(entry["routing"]["load"])}))
        return cls(entry["name"], routing, entry["measured_on"], entry["notes"], entry["seconds"])


@torch.no_grad()
def factorize_block(
    block: Block, acts: Activations, held_out: Activations | None, target: Target, options: FactorizeOptions
) -> Made[LayerRecord]:
    """The on-disk tensors that take the place of the block's FFN, and what is to be said of them.

    `block` is dense; `acts` and `held_out` are what enters it behind the blocks factorized so far.
    """
    started = time.perf_counter()
    layout, recipe, container = options.layout, options.recipe, options.container
    generator = generator_for(block.name, recipe.seed)
    dense = load_ffn(block, target, options.device)
    inputs = ffn_inputs(block, acts)

    some = draw(inputs, PROFILE_TOKENS, generator).to(options.device)
    split = SPLITS[recipe.split](layout, dense.loudness(some).T.contiguous(), generator)
    x = draw(inputs, ROUTER_TOKENS, generator).to(options.device)
    affine = container.bias is not None
    scores = ROUTERS[recipe.router](RouterTask(dense, split, x, layout.active, affine, recipe.router_steps, generator))
    router = shipped(scores, x, container.formula, layout.active, target.dtype)
    notes: dict[str, Any] = {}
    written = scaled(dense, split, SCALES[recipe.scale](dense, split, router, [some]))
    if recipe.refit:
        written, notes = refit(dense, written, split, router, inputs)

    seen = ffn_inputs(block, first_tokens(held_out, MEASURED_TOKENS)) if held_out else inputs
    routing = routing_quality(dense, written, split, router, [draw(seen, MEASURED_TOKENS, generator)])
    tensors = export.tensors(container, layout, target.prefix, written, split, router, target.dtype)
    where = "held-out" if held_out else "calibration"
    notes |= {"zeros_before": dense.zeros()}
    return Made(tensors, LayerRecord(block.name, routing, where, notes, time.perf_counter() - started))


def load_ffn(block: Block, target: Target, device: torch.device) -> FFN:
    """The FFN in fp32 on the device that computes."""
    return FFN(*(block.view(weight).to(device, torch.float32) for weight in (target.gate, target.up, target.down)))


class _Known(Exception):
    """What was wanted of a block is known; the rest of it need not run."""


def ffn_inputs(block: Block, acts: Activations) -> list[Tensor]:
    """What enters the FFN, one (tokens, width) a batch, on the device of the activations."""
    inputs: list[Tensor] = []

    def note(slot: Slot, x: Tensor) -> None:
        if slot[0] == "mlp.gate_proj.weight":
            inputs.append(x.to(acts.hidden[0].device, copy=True))
            raise _Known  # the FFN is most of the block

    with Tap(block, note):
        for batch in range(len(acts.hidden)):
            with suppress(_Known):
                block.call(acts, batch)
    if not all(torch.isfinite(x).all() for x in inputs):
        raise NumericalError(
            f"the activations that enter the FFN of {block.name} are NaN or Inf; try --dtype float32, or check the model"
        )
    return inputs


def first_tokens(acts: Activations, count: int) -> Activations:
    """The first batches, until they hold `count` tokens."""
    batches, tokens = 0, 0
    while batches < len(acts.hidden) and tokens < count:
        tokens += acts.hidden[batches].shape[:2].numel()
        batches += 1
    return acts.like(acts.hidden[:batches])


def draw(inputs: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """At most `count` tokens of all, drawn by the generator, in order: (tokens, width) fp32."""
    total = sum(map(len, inputs))
    rows = torch.randperm(total, generator=generator)[:count].sort().values
    found: list[Tensor] = []
    start = 0
    for x in inputs:
        inside = rows[(rows >= start) & (rows < start + len(x))] - start
        found.append(x[inside.to(x.device)].float())
        start += len(x)
    return torch.cat(found)
