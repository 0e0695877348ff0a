"""A block's weights while they are tuned: fp32 leaves, where they may move, and the loss on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llmsparse.calibration.matching_loss import Loss
from llmsparse.models.streamed import Activations, Block

SCALE = 2.0**16  # of the loss in half precision
BETAS = (0.9, 0.95)  # of Adam


class Tuner:
    """The parameters named in `keep` as fp32 leaves that start from what is stored.

    `keep`: module parameter name → bool mask of its shape, True where a weight may move; what it is False for is 0, or stays
    what it is. `restore` gives the module its own parameters back.
    """

    def __init__(
        self, block: Block, acts: Activations, loss: Loss, keep: Mapping[str, Tensor], autocast: torch.dtype | None
    ) -> None:
        self.block, self.acts, self._loss, self.autocast = block, acts, loss, autocast
        self.share = acts.share
        self.scale = 1.0 if autocast is None else SCALE
        self.parameters = {name: block.module.get_parameter(name) for name in keep}
        self.device = next(iter(self.parameters.values())).device
        stored = block.in_module(block.stored)  # the module may hold them rounded to the compute dtype
        self.keep = self._placed(keep)
        self._never: dict[str, Tensor] = {}  # once weights fade: what stays whatever it is
        self.load({name: stored[name] for name in keep})

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Go on from these values, of any dtype, which are copied."""
        for name, parameter in self.parameters.items():
            parameter.data = values[name].to(self.device, torch.float32, copy=True)
            parameter.requires_grad_(True)

    def begin_fading(self, values: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> None:
        """Start over from these values, of which what `keep` names may move, and may fade."""
        self.load(values)
        self.keep = self._placed(keep)
        self._never = {name: ~mask for name, mask in self.keep.items()}

    def fade(self, keep: Mapping[str, Tensor]) -> None:
        """From here on only these move, and the others that may fade are 0."""
        self.keep = self._placed(keep)
        self._zero()

    def _zero(self) -> None:
        for name, never in self._never.items():
            self.parameters[name].data.mul_(self.keep[name] | never)

    def _placed(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: mask.to(self.device) for name, mask in keep.items()}

    def values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def restore(self) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.block.reload()

    def loss(self, batch: int) -> Tensor:
        """Of a batch that is held here."""
        place = self.share.place(batch)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.block.call(self.acts, place)
        return self._loss(output, place)

    @torch.no_grad()
    def error(self, batches: Sequence[int]) -> float:
        losses = {batch: self.loss(batch).item() for batch in batches if batch in self.share.numbers}
        return sum(self.share.collected(losses).values()) / len(batches)

    def start(self, rate: float) -> torch.optim.Adam:
        """An optimizer whose steps are `rate` of each parameter's root mean square."""
        scales: list[tuple[nn.Parameter, float]] = []
        for name, parameter in self.parameters.items():
            kept = self.keep[name].sum().clamp_min(1)
            scales.append((parameter, (parameter.data.square().sum() / kept).sqrt().item()))
        groups = [{"params": [parameter], "lr": rate * scale, "base": rate * scale} for parameter, scale in scales]
        return torch.optim.Adam(groups, betas=BETAS)

    def step(self, optimizer: torch.optim.Adam, batches: Sequence[int], fraction: float) -> None:
        """One step on these batches, wherever they are held, at a fraction of the rate."""
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
        self._zero()  # what Adam remembers moves weights that have faded

    def probe(
        self, rate: float, schedule: Sequence[Sequence[int]], validation: Sequence[int], start: Mapping[str, Tensor]
    ) -> float:
        """Validation error after a few steps at a constant rate from `start`, to which the weights are put back."""
        optimizer = self.start(rate)
        for batches in schedule:
            self.step(optimizer, batches, 1.0)
        error = self.error(validation)
        self.load(start)
        return error if math.isfinite(error) else math.inf


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may not be there."""
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)
