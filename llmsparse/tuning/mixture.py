"""One factorized FFN as transformers holds it: what its router ranks experts by, and what each expert would add.

All four containers keep their parts under the same names once loaded, whatever they are called on disk: `gate`,
`experts.gate_up_proj` (experts, 2·width, hidden), `experts.down_proj` (experts, hidden, width), and a shared expert.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmsparse.factorization.containers import Container

SHARED = ("shared_experts", "shared_expert")  # what glm4_moe and qwen2_moe call theirs
SHARED_GATE = "shared_expert_gate"


class Mixture:
    """A view of one FFN of the student; `name` is that of its module in the model."""

    def __init__(self, name: str, module: nn.Module, container: Container, active: int) -> None:
        self.name, self.module, self.active = name, module, active
        parts: Any = module
        self.gate, self.experts = parts.gate, parts.experts
        self.shared: nn.Module | None = next((getattr(parts, part) for part in SHARED if hasattr(parts, part)), None)
        self._sigmoid = container.formula == "sigmoid"
        self._sharpness = 1.0
        own = self.gate.forward

        def exact(hidden: Tensor) -> Any:
            with torch.autocast(hidden.device.type, enabled=False):
                return own(hidden.float())

        self.gate.forward = exact  # its scores differ by a thousandth: in bf16 they would all be the same

    @property
    def routed(self) -> int:
        return self.gate.weight.shape[0]

    @property
    def chooses(self) -> bool:
        """Whether there is anything for the router to decide."""
        return self.active < self.routed

    def logits(self, x: Tensor) -> Tensor:
        """The router's logits for x (tokens, hidden), in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.gate.weight)

    def ranking(self, logits: Tensor) -> Tensor:
        """What the container ranks experts by (tokens, routed): the logits, or their sigmoid and its bias."""
        return logits.sigmoid() + self.gate.e_score_correction_bias if self._sigmoid else logits

    def scores(self, logits: Tensor) -> Tensor:
        """The same at a scale at which a softmax over experts says something; see `sharpen`."""
        return self._sharpness * self.ranking(logits)

    @torch.no_grad()
    def sharpen(self, x: Tensor) -> None:
        """From now on the scores have a spread of about 1 on inputs like these (tokens, hidden).

        A factorized router is stored so small that every expert which runs weighs alike: a softmax of its logits is
        flat, and their gradient next to nothing.
        """
        ranking = self.ranking(self.logits(x))
        spread = (ranking - ranking.mean(1, keepdim=True)).square().mean().sqrt().item()
        self._sharpness = 2.0 ** -round(math.log2(spread)) if spread > 0 else 1.0

    @property
    def router_scale(self) -> float:
        """The size of a router that has the scores for its logits, over that of the one that is stored: a power of 2."""
        return self._sharpness * (0.25 if self._sigmoid else 1.0)  # the slope of a sigmoid at 0

    @torch.no_grad()
    def shared_output(self, x: Tensor) -> Tensor:
        """What runs for every token: (tokens, hidden), zeros where nothing does."""
        if self.shared is None:
            return torch.zeros_like(x)
        out = self.shared(x)
        gate = getattr(self.module, SHARED_GATE, None)
        return out if gate is None else gate(x).sigmoid() * out

    @torch.no_grad()
    def expert_outputs(self, x: Tensor) -> Tensor:
        """What each routed expert adds where it runs, weighed 1/active: x (tokens, hidden) → (tokens, routed, hidden)."""
        gate, up = torch.einsum("td,ewd->tew", x, self.experts.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("tew,edw->ted", F.silu(gate) * up, self.experts.down_proj) / self.active
