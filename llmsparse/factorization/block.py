"""One block: what enters its FFN is recorded, the neurons are split, the router made, the experts fitted, all measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from llmsparse.factorization.router import ROUTERS, Router, RouterTask, shipped
from llmsparse.factorization.split import SPLITS, Layout, Split
from llmsparse.models.streamed import Activations, Block, Slot
from llmsparse.models.tap import Tap
from llmsparse.models.weight import Weight
from llmsparse.ranks.share import Share
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
    """The on-disk tensors that take the place of the block's FFN, at the first process, and what is to be said of them.

    `block` is dense; `acts` and `held_out` are what enters it behind the blocks factorized so far. Of several processes each
    sums up its own tokens; the first one chooses, trains and solves.
    """
    started = time.perf_counter()
    layout, recipe, container = options.layout, options.recipe, options.container
    generator = generator_for(block.name, recipe.seed)  # of the first process
    share, ranks = acts.share, acts.share.ranks
    dense = load_ffn(block, target, options.device)
    inputs = ffn_inputs(block, acts)

    some = draw(inputs, share, PROFILE_TOKENS, generator).to(options.device)

    def make_split() -> Split:
        loudness = dense.loudness(some).T.contiguous()  # (neurons, tokens)
        if not torch.isfinite(loudness).all():
            raise NumericalError(
                f"the hidden units of the FFN of {block.name} are NaN or Inf in float32; check the model"
            )
        return SPLITS[recipe.split](layout, loudness, generator)

    split = ranks.known(make_split)
    x = draw(inputs, share, ROUTER_TOKENS, generator).to(options.device)

    def make_router() -> tuple[Router, Tensor]:
        affine = container.bias is not None
        scores = ROUTERS[recipe.router](
            RouterTask(dense, split, x, layout.active, affine, recipe.router_steps, generator)
        )
        router = shipped(scores, x, container.formula, layout.active, target.dtype)
        return router, SCALES[recipe.scale](dense, split, router, [some])

    router, scales = ranks.known(make_router)
    notes: dict[str, Any] = {}
    written = scaled(dense, split, scales)
    if recipe.refit:
        written, notes = refit(dense, written, split, router, inputs, share)

    if held_out:
        few = held_out.share.first_batches(MEASURED_TOKENS)
        judged = draw(ffn_inputs(block, held_out, few), held_out.share, MEASURED_TOKENS, generator, few)
    else:
        judged = draw(inputs, share, MEASURED_TOKENS, generator)
    routing = ranks.known(lambda: routing_quality(dense, written, split, router, [judged]))
    where = "held-out" if held_out else "calibration"
    notes = ranks.broadcast(notes, 0) | {"zeros_before": dense.zeros()}
    record = LayerRecord(block.name, routing, where, notes, time.perf_counter() - started)
    tensors: dict[str, Tensor] = {}
    with ranks.together():
        if ranks.first:
            tensors = export.tensors(container, layout, target.prefix, written, split, router, target.dtype)
    return Made(tensors, record)


def load_ffn(block: Block, target: Target, device: torch.device) -> FFN:
    """The FFN in fp32 on the device that computes."""
    return FFN(*(block.view(weight).to(device, torch.float32) for weight in (target.gate, target.up, target.down)))


class _Known(Exception):
    """What was wanted of a block is known; the rest of it need not run."""


def ffn_inputs(block: Block, acts: Activations, most: int | None = None) -> list[Tensor]:
    """What enters the FFN, one (tokens, width) a batch that is held here, on the device of the activations; `most`: of the
    first so many of all batches."""
    inputs: list[Tensor] = []

    def note(slot: Slot, x: Tensor) -> None:
        if slot[0] == "mlp.gate_proj.weight":
            inputs.append(x.to(acts.hidden[0].device, copy=True))
            raise _Known  # the FFN is most of the block

    with acts.share.ranks.together():
        with Tap(block, note):
            for place, number in enumerate(acts.share.numbers):
                if most is None or number < most:
                    with suppress(_Known):
                        block.call(acts, place)
        if not all(torch.isfinite(x).all() for x in inputs):
            raise NumericalError(
                f"the activations that enter the FFN of {block.name} are NaN or Inf; try --dtype float32, or check the model"
            )
    return inputs


def draw(
    inputs: Sequence[Tensor], share: Share, count: int, generator: torch.Generator, most: int | None = None
) -> Tensor:
    """At most `count` tokens of all, or of the first batches, drawn by the generator, in order: (tokens, width) fp32 at the first
    process, none at others. `inputs`: of the batches held here."""
    total = sum(windows * tokens for windows, tokens in share.shapes[:most])
    rows = share.ranks.known(lambda: torch.randperm(total, generator=generator)[:count].sort().values)

    def leaf(number: int) -> list[list[Tensor]]:
        found: list[Tensor] = []
        start = share.tokens_before(number)
        for batch in share.leaves[number]:
            if most is None or batch < most:
                x = inputs[share.place(batch)]
                inside = rows[(rows >= start) & (rows < start + len(x))] - start
                found.append(x[inside.to(x.device)])
                start += len(x)
        return [found]

    [found] = share.summed(leaf, lambda one, other: one + other, [0])
    return torch.cat(found).float() if found else torch.empty(0)
