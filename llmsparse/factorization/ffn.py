"""The gated FFN of one block, y = W_d h with h = silu(W_g x) · (W_u x), as three matrices in fp32.

Its output is the sum of what its neurons add, so any partition of the neurons into experts gives y = Σ oᵢ(x) exactly.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FFN:
    """`gate` and `up` are (neurons, width), `down` is (width, neurons)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def neurons(self) -> int:
        return self.gate.shape[0]

    def hidden(self, x: Tensor) -> Tensor:
        """What each neuron says about each token: x (tokens, width) → h (tokens, neurons)."""
        x = x.to(self.gate.dtype)
        return F.silu(x @ self.gate.T) * (x @ self.up.T)

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, width) → y (tokens, width)."""
        return self.hidden(x) @ self.down.T

    def loudness(self, x: Tensor) -> Tensor:
        """|hⱼ(x)| · ‖column j of W_d‖, the size of what each neuron adds to the output: (tokens, neurons)."""
        return self.hidden(x).abs() * self.down.norm(dim=0)

    def to(self, device: torch.device) -> FFN:
        return FFN(self.gate.to(device), self.up.to(device), self.down.to(device))
