"""What of a mixture is trained: its router, the experts' matrices too, or a low-rank addition to each of these.

A weight that is exactly zero stays zero: those that pruning left, and the neurons that pad an expert. A trained weight
is hardly ever zero by chance. A router is trained at the scale of its scores, not at the tiny one it is stored at, so
that one learning rate fits all routers, and its gradients those of the experts when both are clipped.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmsparse.runs.seeding import generator_for
from llmsparse.tuning.mixture import Mixture

MATRICES = ("gate_proj", "up_proj", "down_proj")  # of a shared expert
STACKS = ("gate_up_proj", "down_proj")  # of the routed ones


class HeldWeight(NamedTuple):
    """A weight: its name in the model, the module that holds it, and its name there."""

    name: str
    module: nn.Module
    leaf: str

    @property
    def value(self) -> Tensor:
        return getattr(self.module, self.leaf)


class Scaled(nn.Module):
    """W = V / scale, V trained; exact, for the scale is a power of 2."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, trained: Tensor) -> Tensor:
        return trained / self.scale

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * self.scale


class LowRank(nn.Module):
    """W + B A, where W is not zero (LoRA, arXiv 2106.09685); W (..., out, in), A (..., rank, in), B (..., out, rank)."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *experts, out, width = weight.shape
        start = torch.randn(*experts, rank, width, generator=generator) / width**0.5
        self.a = nn.Parameter(start.to(weight))
        self.b = nn.Parameter(weight.new_zeros(*experts, out, rank))
        self.keep = _kept(weight)

    def forward(self, weight: Tensor) -> Tensor:
        added = self.b @ self.a
        return weight + (added if self.keep is None else added * self.keep)


class Trainable:
    """The parameters that move, `routers` and `experts` (both name → parameter), in fp32; everything else is frozen."""

    def __init__(self, model: nn.Module, mixtures: Sequence[Mixture], how: str, rank: int, seed: int) -> None:
        model.requires_grad_(False)
        self.routers: dict[str, nn.Parameter] = {}
        self.experts: dict[str, nn.Parameter] = {}
        self._places: list[HeldWeight] = []
        for mixture in mixtures:
            if mixture.chooses:
                place = HeldWeight(f"{mixture.name}.gate.weight", mixture.gate, "weight")
                parametrize.register_parametrization(mixture.gate, "weight", Scaled(mixture.router_scale))
                self.routers[place.name] = mixture.gate.parametrizations.weight.original
                self._places.append(place)
            for place in [] if how == "router" else matrices(mixture):
                self.experts |= _adapted(place, rank, seed) if how == "lora" else _opened(place)
                self._places.append(place)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self.routers | self.experts

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """Name in the model → the weight as it is now, for all that may have changed."""
        return {place.name: place.value.detach() for place in self._places}

    @torch.no_grad()
    def settle(self, values: dict[str, Tensor]) -> None:
        """End of training: plain weights again, with these values."""
        for name, module, leaf in self._places:
            if parametrize.is_parametrized(module, leaf):
                parametrize.remove_parametrizations(module, leaf)
            module.get_parameter(leaf).copy_(values[name])


def matrices(mixture: Mixture) -> Iterator[HeldWeight]:
    """Every matrix of every expert."""
    for leaf in STACKS:
        yield HeldWeight(f"{mixture.name}.experts.{leaf}", mixture.experts, leaf)
    if mixture.shared is not None:
        path = next(path for path, module in mixture.module.named_modules() if module is mixture.shared)
        for part in MATRICES:
            yield HeldWeight(f"{mixture.name}.{path}.{part}.weight", mixture.shared.get_submodule(part), "weight")


def _opened(place: HeldWeight) -> dict[str, nn.Parameter]:
    """The weight itself, its zeros without gradient: AdamW moves no zero whose gradients were all zero."""
    weight = place.module.get_parameter(place.leaf)
    if (keep := _kept(weight)) is not None:
        weight.requires_grad_(True).register_hook(_masking(keep))
    return {place.name: weight}


def _adapted(place: HeldWeight, rank: int, seed: int) -> dict[str, nn.Parameter]:
    added = LowRank(place.value, rank, generator_for(place.name, seed))
    parametrize.register_parametrization(place.module, place.leaf, added)
    return {f"{place.name}.a": added.a, f"{place.name}.b": added.b}


def _kept(weight: Tensor) -> Tensor | None:
    """Where a weight is not zero; None where it never is."""
    keep = weight.detach() != 0
    return None if keep.all() else keep


def _masking(keep: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * keep
