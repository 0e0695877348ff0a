"""The gated FFN of one block, y = W_d h with h = silu(W_g x) · (W_u x), as three matrices in fp32.

Its output is the sum of what its neurons add, so any partition of the neurons into experts gives y = Σ oᵢ(x) exactly.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass

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

    def zeros(self) -> float:
        """Fraction of the three matrices that is 0."""
        matrices = (self.gate, self.up, self.down)
        return 1 - sum(int(one.count_nonzero()) for one in matrices) / sum(one.numel() for one in matrices)

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, width) → y (tokens, width)."""
        return self.hidden(x) @ self.down.T

    def loudness(self, x: Tensor) -> Tensor:
        """|hⱼ(x)| · ‖column j of W_d‖, the size of what each neuron adds to the output: (tokens, neurons)."""
        return self.hidden(x).abs() * self.down.norm(dim=0)
