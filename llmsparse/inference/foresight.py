"""Which experts the next layers will want: their routers are asked already now, with what enters the experts of this one.

From layer to layer a token's hidden state changes little, so most of what a router says of the state before it says of the
next too. Where it errs an expert is read that is not used; what is computed does not change.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 2  # layers ahead


class Foresight:
    """Of the layers of experts of a model, in their order."""

    def __init__(self, routers: Sequence[nn.Module | None], experts: Sequence[int]) -> None:
        self._routers, self._experts = routers, experts

    @classmethod
    def of(cls, model: nn.Module, modules: Sequence[tuple[str, Any]]) -> Foresight:
        """`modules`: names and modules of experts."""
        return cls(
            [router_of(model, name, module) for name, module in modules],
            [int(module.num_experts) for _, module in modules],
        )

    @property
    def known(self) -> int:
        """Layers whose router can be asked."""
        return sum(router is not None for router in self._routers)

    @torch.no_grad()
    def after(self, layer: int, x: Tensor, k: int) -> list[tuple[int, int]]:
        """(layer, expert) of the layers behind one: what the next will most likely want, then the one after that.
        x (tokens, width) enters the experts of `layer`, k of which each token gets."""
        found: list[tuple[int, int]] = []
        for behind in range(layer + 1, min(layer + 1 + DEPTH, len(self._routers))):
            router = self._routers[behind]
            if router is not None:
                chosen = choices(router, x, k, self._experts[behind])
                if len(chosen) > 1:  # what more tokens want comes first
                    counts = chosen.flatten().bincount(minlength=self._experts[behind])
                    order = counts.argsort(descending=True, stable=True)[: int(counts.count_nonzero())]
                else:
                    order = chosen[0]
                found += [(behind, expert) for expert in order.tolist()]
        return found


def router_of(model: nn.Module, name: str, experts: Any) -> nn.Module | None:
    """The router beside a module of experts, which can be asked with hidden states alone; None if there is none such."""
    for beside in model.get_submodule(name.rpartition(".")[0]).children():
        weights = [one for one in beside.parameters() if one.dim() == 2 and one.shape[0] == experts.num_experts]
        if beside is experts or not weights:
            continue
        try:
            with torch.no_grad():
                chosen = choices(beside, weights[0].new_zeros(2, weights[0].shape[1]), 1, experts.num_experts)
        except Exception:  # it wants more than that: every architecture has a router of its own
            continue
        if chosen.dim() == 2 and len(chosen) == 2:
            return beside
    return None


def choices(router: Any, x: Tensor, k: int, experts: int) -> Tensor:
    """x (tokens, width) → the experts of each token, (tokens, k). ValueError where the router's output does not tell."""
    given = router.forward(x)  # whoever listens to the module shall not hear of this
    outputs = [one for one in (given if isinstance(given, tuple | list) else (given,)) if isinstance(one, Tensor)]
    for output in outputs:
        if not output.is_floating_point() and output.dtype != torch.bool and output.dim() == 2:
            return output
    for output in outputs:
        if output.shape == (len(x), experts):
            bias = getattr(router, "e_score_correction_bias", None)
            return (output if bias is None else output.sigmoid() + bias).topk(k).indices
    raise ValueError("neither experts nor a number for each")
