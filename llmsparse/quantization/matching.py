"""Matching on top: small integers and steps of a block are tuned until it computes what it did before.

As `calibration/matching.py`, but what Adam moves are numbers behind the rounding, with gradients straight through it (Bengio et al.,
2013), and the steps. They begin in the middle of nothing: at the source's own weight, brought into the cell of the number that
feedback chose, so that the first step starts from exactly what is stored. Cells stay those of the rate-distortion rounding, and
bits about what they were. Kept only where windows that were held out say so.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmsparse.calibration.matching import CHECKS, Match, batches_per_step, fraction_at, schedule_of, shares
from llmsparse.calibration.matching_loss import Loss
from llmsparse.calibration.tuner import Tuner
from llmsparse.formats.nested import rows_sharing
from llmsparse.models.streamed import Activations, Block
from llmsparse.quantization.rounding import round_by, thresholds
from llmsparse.sparsity.patterns import is_sparse

RATE = 3e-3  # of the root mean square of a weight's numbers, and of its steps
EDGE = 1e-3  # of a step, inside the cell


class Numbers(NamedTuple):
    """A parameter of a block in small integers, in the shape that it has in the module."""

    q: Tensor  # int8
    steps: Tensor  # bfloat16, of its shape but for one size that divides that of the parameter


class Rounded(nn.Module):
    """What a parameter is while it is tuned: step · the whole number of what stands behind it."""

    def __init__(self, weight: Tensor, numbers: Numbers, rate: float, most: int) -> None:
        super().__init__()
        self._shape = numbers.steps.shape
        self.steps = nn.Parameter(shared(numbers.steps).to(weight.device, torch.float32))
        self.keep, self.most = weight != 0 if is_sparse(weight) else None, most
        quotients = weight / spread(self.steps.detach(), weight.shape)
        self.above = thresholds(quotients if self.keep is None else quotients[self.keep], rate).to(weight.device)

    def forward(self, latent: Tensor) -> Tensor:
        """latent and result of the parameter's shape, fp32."""
        steps = spread(through(self.steps, self.stored_steps().float()), latent.shape)
        quotient = latent / steps.detach()
        return through(quotient, self.whole(quotient.detach())) * steps

    def whole(self, quotient: Tensor) -> Tensor:
        q = round_by(quotient, self.above, self.most)
        return q if self.keep is None else q * self.keep

    def stored_steps(self) -> Tensor:
        return self.steps.detach().abs().to(torch.bfloat16)

    @torch.no_grad()
    def numbers(self, latent: Tensor) -> Numbers:
        """What would be stored now."""
        steps = self.stored_steps()
        q = self.whole(latent / spread(steps.float(), latent.shape)).to(torch.int8)
        return Numbers(q.cpu(), spread(steps, self._shape).cpu())

    def start(self, weight: Tensor, q: Tensor) -> Tensor:
        """The source's weight, brought into the cells of its numbers: rounding it gives these."""
        size = q.abs()
        high = size + self.above[size.long()] - EDGE
        low = torch.where(size > 0, size - 1 + self.above[(size.long() - 1).clamp_min(0)] + EDGE, -high)
        toward = torch.where(q == 0, 1.0, q.sign())
        steps = spread(self.stored_steps().float(), weight.shape)
        return torch.minimum(torch.maximum(weight / steps * toward, low), high) * toward * steps


class _RoundedTuner(Tuner):
    """The block with its parameters rounded as they are used."""

    def __init__(
        self,
        block: Block,
        acts: Activations,
        loss: Loss,
        numbers: Mapping[str, Numbers],
        rate: float,
        most: int,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__(block, acts, loss, {name: torch.ones(()) for name in numbers}, autocast)
        self.rounded: dict[str, Rounded] = {}
        latents: dict[str, nn.Parameter] = {}
        for name, held in numbers.items():
            path, _, leaf = name.rpartition(".")
            module, latent = block.module.get_submodule(path), self.parameters[name]
            rounded = Rounded(latent.data, held, rate, most)
            latent.data = rounded.start(latent.data, held.q.to(self.device, torch.float32))
            parametrize.register_parametrization(module, leaf, rounded, unsafe=True)
            self.rounded[name] = rounded
            latents[name] = module.parametrizations[leaf].original  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue, reportUnknownVariableType, reportArgumentType]
            latents[f"{name} steps"] = rounded.steps
        self.parameters = latents
        self.keep = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in latents.items()}

    def found(self) -> dict[str, Numbers]:
        return {name: held.numbers(self.parameters[name]) for name, held in self.rounded.items()}

    def restore(self) -> None:
        for name in self.rounded:
            path, _, leaf = name.rpartition(".")
            parametrize.remove_parametrizations(self.block.module.get_submodule(path), leaf)
            self.block.module.get_parameter(name).requires_grad_(False)
        self.block.reload()


@torch.enable_grad()
def match_numbers(
    block: Block,
    acts: Activations,
    loss: Loss,
    numbers: Mapping[str, Numbers],
    *,
    rate: float,
    most: int,
    steps: int,
    seed: int,
    autocast: torch.dtype | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Numbers], Match]:
    """Tune `numbers`, by module parameter name, until the loss of the block's outputs for `acts` is small.

    `block.stored` is what it was before, too, and the module is left with that. `rate` is that of `thresholds`, `most` the largest
    number. Returns the numbers that lose least on held-out
    batches, which may be those given, and a record.
    """
    share = acts.share
    validation, reported, train = shares(share.total)
    group = share.ranks.known(lambda: batches_per_step(*acts.hidden[0].shape, most=len(train)))
    tuner = _RoundedTuner(block, acts, loss, numbers, rate, most, autocast)
    before = tuner.error(reported)
    first = before if reported == validation else tuner.error(validation)
    best, best_error, after = dict(numbers), first, before
    optimizer = tuner.start(RATE)
    schedule = schedule_of(train, group, steps, seed, share.leaves)
    for step, batches in enumerate(schedule):
        tuner.step(optimizer, batches, fraction_at(step, len(schedule)))
        advance()
        if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
            error = tuner.error(validation)
            if error < best_error:
                best, best_error = tuner.found(), error
                after = error if reported == validation else tuner.error(reported)
    tuner.restore()
    validated = not set(train) & set(validation)
    return best, Match(before, after, steps, RATE, validated, best_error < first, loss.of)


def spread(steps: Tensor, shape: torch.Size) -> Tensor:
    """Steps of groups → of every place of `shape`."""
    for dimension, (few, many) in enumerate(zip(steps.shape, shape, strict=True)):
        if few != many:
            steps = steps.repeat_interleave(many // few, dim=dimension)
    return steps


def shared(steps: Tensor) -> Tensor:
    """Steps of which one stands for all that share it: what `spread` gives back."""
    for dimension in range(steps.ndim):
        along = steps.transpose(0, dimension).flatten(1)
        steps = steps.transpose(0, dimension)[:: rows_sharing(along)].transpose(0, dimension)
    return steps.contiguous()


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient going to `value`."""
    return value + (rounded - value).detach()
