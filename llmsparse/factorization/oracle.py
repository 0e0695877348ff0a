"""How well a layer routes: output energy it captures, beside the best that choosing could do, and who gets the load."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.refit import gated
from llmsparse.factorization.router import Router, expert_outputs, tokens_at_once
from llmsparse.factorization.split import Split


@dataclass(frozen=True)
class Routing:
    """Energies are 1 − ‖y − ŷ‖² / ‖y‖² over some tokens; with experts as they are unless it says otherwise."""

    captured: float  # as written: the router's choice, scaled or refitted experts
    unfitted: float  # the router's choice
    oracle: float  # the choice of `greedy`, which sees the outputs
    load: tuple[float, ...]  # share of the tokens that each routed expert runs for

    @property
    def entropy(self) -> float:
        """Of the load, from 0 (always the same experts) to 1 (all alike)."""
        shares = [share / sum(self.load) for share in self.load if share > 0]
        most = math.log(len(self.load))
        return -sum(share * math.log(share) for share in shares) / most if most else 1.0

    @property
    def dead(self) -> int:
        """Routed experts that ran for no token."""
        return sum(share == 0 for share in self.load)


def greedy(outputs: Tensor, active: int, target: Tensor | None = None) -> Tensor:
    """Experts chosen one after the other, each to leave the least of `target` (tokens, width), which is Σ oᵢ if not
    given; outputs (tokens, routed, width) → mask (tokens, routed)."""
    products = outputs @ outputs.transpose(1, 2)  # (tokens, routed, routed)
    size = products.diagonal(dim1=1, dim2=2)
    along = products.sum(-1) if target is None else (outputs @ target[:, :, None])[..., 0]  # oᵢ · target
    mask = torch.zeros(outputs.shape[:2], dtype=torch.bool, device=outputs.device)
    for _ in range(active):
        left = along - (products * mask[:, None]).sum(-1)  # oᵢ · (target − Σ oⱼ of those chosen)
        gain = (2 * left - size).masked_fill(mask, -torch.inf)
        mask.scatter_(1, gain.argmax(1, keepdim=True), True)
    return mask


def routing_quality(dense: FFN, written: FFN, split: Split, router: Router, inputs: Iterable[Tensor]) -> Routing:
    """Energies and load over `inputs`, (tokens, width) each."""
    energy, missed, tokens = 0.0, torch.zeros(3, dtype=torch.float64), 0
    load = torch.zeros(len(split.routed), dtype=torch.float64)
    for batch in inputs:
        for part in batch.split(tokens_at_once(dense, split)):
            x = part.to(dense.down.device, torch.float32)
            hidden = dense.hidden(x)  # `written` has another down projection, no other neurons
            outputs = expert_outputs(dense, split, x, hidden)
            routed = outputs.sum(1)
            target = hidden @ dense.down.T
            gates = router.gates(x)
            errors = (
                target - gated(hidden, split, gates) @ written.down.T,
                routed - (outputs * gates[..., None]).sum(1),
                routed - (outputs * greedy(outputs, router.active)[..., None]).sum(1),
            )
            missed += torch.stack([error.square().sum() for error in errors]).double().cpu()
            energy += target.square().sum().item()
            load += (gates > 0).sum(0).double().cpu()
            tokens += len(x)
    captured = (1 - missed / energy).tolist() if energy > 0 else [1.0, 1.0, 1.0]
    return Routing(captured[0], captured[1], captured[2], tuple((load / tokens).tolist()))
