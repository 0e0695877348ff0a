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
        self.scale = 1.0 if autocast is None else SCALE
        self.parameters = {name: block.module.get_parameter(name) for name in keep}
        self.original = {name: parameter.data for name, parameter in self.parameters.items()}
        stored = block.in_module(block.stored)  # the module may hold them rounded to the compute dtype
        self.keep = self._placed(keep)
        self._never: dict[str, Tensor] = {}  # once weights fade: what stays whatever it is
        self.load({name: stored[name] for name in keep})

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Go on from these values, of any dtype, which are copied."""
        for name, parameter in self.parameters.items():
            parameter.data = values[name].to(self.original[name].device, torch.float32, copy=True)
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
        return {name: mask.to(self.original[name].device) for name, mask in keep.items()}

    def values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def restore(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = self.original[name]

    def loss(self, batch: int) -> Tensor:
        hidden = self.acts.hidden[batch]
        device = next(iter(self.original.values())).device
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            output = self.block.call(self.acts, batch, hidden=hidden.to(device))
        return self._loss(output, batch)

    @torch.no_grad()
    def error(self, batches: Sequence[int]) -> float:
        return sum(self.loss(batch).item() for batch in batches) / len(batches)

    def start(self, rate: float) -> torch.optim.Adam:
        """An optimizer whose steps are `rate` of each parameter's root mean square."""
        scales: list[tuple[nn.Parameter, float]] = []
        for name, parameter in self.parameters.items():
            kept = self.keep[name].sum().clamp_min(1)
            scales.append((parameter, (parameter.data.square().sum() / kept).sqrt().item()))
        groups = [{"params": [parameter], "lr": rate * scale, "base": rate * scale} for parameter, scale in scales]
        return torch.optim.Adam(groups, betas=BETAS)

    def step(self, optimizer: torch.optim.Adam, batches: Sequence[int], fraction: float) -> None:
        """One step on these batches, at a fraction of the rate."""
        optimizer.zero_grad()
        for batch in batches:
            (self.loss(batch) * (self.scale / len(batches))).backward()
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:  # None for experts that no token of these batches reached
                parameter.grad.mul_(self.keep[name])  # Adam never moves a weight whose gradients were all zero
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * fraction
        optimizer.step()
        self._zero()  # what Adam remembers moves weights that have faded

    def probe(self, rate: float, schedule: Sequence[Sequence[int]], validation: Sequence[int]) -> float:
        """Validation error after a few steps at a constant rate; the weights are put back."""
        start = self.values()
        optimizer = self.start(rate)
        for batches in schedule:
            self.step(optimizer, batches, 1.0)
        error = self.error(validation)
        self.load(start)
        return error if math.isfinite(error) else math.inf
