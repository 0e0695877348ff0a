"""Block matching: tune what pruning left of a block until the block computes what it did when it was dense.

With the mask frozen, minimise the relative squared error of the block's output on the inputs that the pruned prefix
really produces (EBFT, arXiv 2402.12419; "transformer matching" of 3BASiL). No gradient crosses a block boundary, so
the memory is that of one block and its Adam state.

Two things differ from the papers' code. The error of each token is divided by that token's own squared norm: the next
block normalises every token, and a few tokens of huge norm would otherwise be all that is matched. The learning rate
is a fraction of each weight's root mean square, found by a short probe on validation windows, so it needs no tuning for
a model. Masters are fp32 and start from what is stored; the validation error decides which step is kept, and a block
that does not improve stays as it was pruned. Since these windows chose rate and step, and the statistics have seen them
too, their error flatters a little: the perplexity of a run is that of windows which chose nothing.

Half precision is bfloat16, whatever the model computes in: an error of a token relative to its own norm, as a mean over
thousands of tokens, has gradients of 1e-9 and less in a large model, all of them 0 in float16. Adam does not care for
scale, so the loss that is backpropagated is scaled up besides, for what a model still does in float16.

Of several processes each has the batches that it holds, and every step takes some of each: their gradients are added up in
the tree of `ranks/tree.py`, so that all take the same step, which is that of one process alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from llmsparse.models.streamed import Activations, Block
from llmsparse.ranks.tree import far_apart

TOKENS_PER_STEP = 4096  # or four times the block's width, if that is more
LEARNING_RATES = (1e-2, 3e-2, 1e-1)  # fractions of a weight's root mean square
PROBE_SHARE = 15  # one step of a probe for so many of the run, at most PROBE_STEPS
PROBE_STEPS = 20
FINAL_FRACTION = 0.05  # of the learning rate, at the end of the cosine
CHECKS = 8  # validation measurements in a run
HELD_OUT_SHARE = 8  # one batch in so many is for validation
SCALE = 2.0**16  # of the loss in half precision


@dataclass(frozen=True)
class Match:
    """What matching did to a block: its relative output error before and after, and how it got there."""

    before: float
    after: float
    steps: int
    learning_rate: float
    validation: bool  # the errors are of windows not trained on; False where calibration is one batch: training error

    @property
    def improved(self) -> bool:
        return self.after < self.before


@torch.enable_grad()
def match(
    block: Block,
    acts: Activations,
    targets: Sequence[Tensor],
    keep: dict[str, Tensor],
    *,
    steps: int,
    seed: int,
    autocast: torch.dtype | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], Match]:
    """Tune the parameters named in `keep` so that the block maps `acts` to `targets`; zeros stay zero.

    `targets`: the dense block's outputs, one (batch, tokens, width) for each hidden state of `acts`. `keep`: module
    parameter name → bool mask of its shape, True where a weight may move. Returns fp32 values of these parameters
    and a record. The module itself is left with its old parameters.
    """
    share = acts.share
    validation = validation_of(share.total)
    train = [j for j in range(share.total) if j not in validation]
    validated = bool(train)
    train = train or validation
    group = share.ranks.known(lambda: batches_per_step(*targets[0].shape, most=len(train)))
    tuner = Tuner(block, acts, targets, keep, autocast)

    before = tuner.error(validation)
    rate = 0.0
    best, best_error = tuner.values(), before
    if steps:
        schedule = schedule_of(train, group, steps, seed, share.leaves)
        probing = schedule[: probe_steps(steps)]
        probes = {rate: tuner.probe(rate, probing, validation, best) for rate in LEARNING_RATES}
        rate = min(probes, key=lambda rate: probes[rate])
        optimizer = tuner.start(rate)
        for step, batches in enumerate(schedule):
            tuner.step(optimizer, batches, FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine(step, len(schedule)))
            advance()
            if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
                error = tuner.error(validation)
                if error < best_error:
                    best, best_error = tuner.values(), error
    tuner.restore()
    return best, Match(before, best_error, steps, rate, validated)


def cosine(step: int, steps: int) -> float:
    """From 1 down to nearly 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def probe_steps(steps: int) -> int:
    """Steps that each learning rate is tried for before a run of `steps`."""
    return min(PROBE_STEPS, max(1, steps // PROBE_SHARE))


def batches_per_step(windows: int, tokens: int, width: int, *, most: int) -> int:
    """How many batches of (windows, tokens, width) make one step of the optimiser: all `most` that there are at most."""
    return min(most, max(1, round(max(TOKENS_PER_STEP, 4 * width) / (windows * tokens))))


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """What products of a model that computes in `dtype` are matched in; None for float32. Only a GPU that has no products
    in bfloat16 of its own takes float16, where the scale of the loss alone keeps gradients from vanishing."""
    if dtype == torch.float32:
        return None
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


class Tuner:
    """The block's kept weights as fp32 leaves, and the loss on them."""

    def __init__(
        self,
        block: Block,
        acts: Activations,
        targets: Sequence[Tensor],
        keep: dict[str, Tensor],
        autocast: torch.dtype | None,
    ) -> None:
        self.block, self.acts, self.targets, self.autocast = block, acts, targets, autocast
        self.share = acts.share
        self.scale = 1.0 if autocast is None else SCALE
        self.parameters = {name: block.module.get_parameter(name) for name in keep}
        self.device = next(iter(self.parameters.values())).device
        stored = block.in_module(block.stored)  # the module may hold them rounded to the compute dtype
        self.keep = {name: mask.to(self.device) for name, mask in keep.items()}
        self._load({name: stored[name] for name in keep})

    def _load(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = values[name].to(self.device, torch.float32, copy=True)
            parameter.requires_grad_(True)

    def values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def restore(self) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.block.reload()

    def loss(self, batch: int) -> Tensor:
        """mean over tokens of ‖block(x) − dense(x)‖² / ‖dense(x)‖², of a batch that is held here."""
        place = self.share.place(batch)
        target = self.targets[place].to(self.device).float()  # (batch, tokens, width)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.block.call(self.acts, place)
        error = (output.float() - target).square().sum(-1)  # (batch, tokens)
        return (error / target.square().sum(-1).clamp_min(1e-12)).mean()

    @torch.no_grad()
    def error(self, batches: Sequence[int]) -> float:
        losses = {batch: self.loss(batch).item() for batch in batches if batch in self.share.numbers}
        return sum(self.share.collected(losses).values()) / len(batches)

    def start(self, rate: float) -> torch.optim.Adam:
        scales: list[tuple[nn.Parameter, float]] = []
        for name, parameter in self.parameters.items():
            kept = self.keep[name].sum().clamp_min(1)
            scales.append((parameter, (parameter.data.square().sum() / kept).sqrt().item()))
        groups = [{"params": [parameter], "lr": rate * scale, "base": rate * scale} for parameter, scale in scales]
        return torch.optim.Adam(groups, betas=(0.9, 0.95))

    def step(self, optimizer: torch.optim.Adam, batches: Sequence[int], fraction: float) -> None:
        parameters = list(self.parameters.values())

        def gradients(leaf: int) -> list[Tensor | None]:
            optimizer.zero_grad()
            for batch in batches:
                if batch in self.share.leaves[leaf]:
                    (self.loss(batch) * (self.scale / len(batches))).backward()
            return [parameter.grad for parameter in parameters]

        sums = self.share.summed_for_all(gradients, _both, [parameter.numel() for parameter in parameters])
        for (name, parameter), gradient in zip(self.parameters.items(), sums, strict=True):
            parameter.grad = gradient
            if gradient is not None:  # None for experts that no token of these batches reached
                gradient.mul_(self.keep[name])  # Adam never moves a weight whose gradients were all zero
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * fraction
        optimizer.step()

    def probe(
        self, rate: float, schedule: Sequence[Sequence[int]], validation: Sequence[int], start: dict[str, Tensor]
    ) -> float:
        """Validation error after a few steps at a constant rate from `start`, to which the weights are put back."""
        optimizer = self.start(rate)
        for batches in schedule:
            self.step(optimizer, batches, 1.0)
        error = self.error(validation)
        self._load(start)
        return error if math.isfinite(error) else math.inf


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may not be there."""
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


def validation_of(batches: int) -> list[int]:
    """An eighth of the batches, evenly spread; the only one when there is just one."""
    return list(range(0, batches, HELD_OUT_SHARE))


def schedule_of(train: Sequence[int], group: int, steps: int, seed: int, leaves: Sequence[range]) -> list[list[int]]:
    """`steps` groups of batch numbers: epochs of a seeded shuffle, dealt so that every group has its batches from leaves
    that lie far apart, and so, of several processes, work for all."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * group:
        shuffled = [train[int(j)] for j in torch.randperm(len(train), generator=generator)]
        piles = [[batch for batch in shuffled if batch in leaves[leaf]] for leaf in far_apart(len(leaves))]
        order += [batch for layer in zip_longest(*piles) for batch in layer if batch is not None]
    return [order[step * group : (step + 1) * group] for step in range(steps)]
