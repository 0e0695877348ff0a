"""Which neuron goes to which expert.

Shared slots run for every token; the routed ones are chosen by the router. `contiguous` and `random` are FactorLLM's
(arXiv 2408.11855). `clustered` shares the neurons that matter most, by mean |h|·‖W_d‖, and puts neurons into one
routed expert that speak up on the same tokens.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from llmsparse.errors import RecipeError
from llmsparse.factorization.clustering import balanced_kmeans

SMALL_FFN = 1024  # neurons; below it kernels' tiles of 64 would be mostly padding


@dataclass(frozen=True)
class Layout:
    """How many experts of which width an FFN of `neurons` neurons becomes.

    Every expert is stored with `width` neurons, the last of them zeros where the neurons do not fill them: a multiple of
    64, or of 8 for an FFN below 1024, which grouped matrix products ask for.
    """

    neurons: int
    experts: int  # slots, shared and routed
    shared: int  # slots that always run
    active: int  # routed experts that run for a token

    def check(self, where: str) -> None:
        """RecipeError for more experts than there are groups of neurons; `where` names the FFN."""
        most = -(-self.neurons // self.multiple)
        if self.experts > most:
            raise RecipeError(
                f"--experts {self.experts}: {where} has {self.neurons} neurons, which are {most} groups of "
                f"{self.multiple}; use --experts {most} or less"
            )

    @property
    def multiple(self) -> int:
        return 64 if self.neurons >= SMALL_FFN else 8

    @property
    def routed(self) -> int:
        return self.experts - self.shared

    @property
    def width(self) -> int:
        return -(-self.neurons // (self.experts * self.multiple)) * self.multiple

    @property
    def shared_neurons(self) -> int:
        """Shared slots are filled up before routed ones, whose padding costs less: it runs for fewer tokens."""
        return min(self.shared * self.width, self.neurons - self.routed)

    @property
    def routed_sizes(self) -> list[int]:
        """Neurons in each routed expert, equal or one apart."""
        left = self.neurons - self.shared_neurons
        return [left // self.routed + (index < left % self.routed) for index in range(self.routed)]

    @property
    def active_share(self) -> float:
        """Neurons that run for a token, padding included, over those of the dense FFN."""
        return (self.shared + self.active) * self.width / self.neurons


@dataclass(frozen=True)
class Split:
    """A partition of the neurons: numbers of the shared ones, and of those of each routed expert. int64, on the CPU."""

    shared: Tensor
    routed: tuple[Tensor, ...]
    _copies: dict[torch.device, Split] = field(default_factory=dict[torch.device, "Split"], compare=False, repr=False)

    @cached_property
    def owner(self) -> Tensor:
        """For each neuron the routed expert it belongs to, or their number for a shared one: (neurons,) int64."""
        count = len(self.shared) + sum(map(len, self.routed))
        owner = torch.full((count,), len(self.routed), device=self.shared.device)
        for expert, members in enumerate(self.routed):
            owner[members] = expert
        return owner

    def on(self, device: torch.device) -> Split:
        """The same on a device: copied there once, however often it is asked for."""
        if device == self.shared.device:
            return self
        if device not in self._copies:
            self._copies[device] = Split(self.shared.to(device), tuple(part.to(device) for part in self.routed))
        return self._copies[device]


def contiguous(layout: Layout, profiles: Tensor, generator: torch.Generator) -> Split:
    """Neurons in the order they are stored in."""
    return _cut(torch.arange(layout.neurons), layout)


def random(layout: Layout, profiles: Tensor, generator: torch.Generator) -> Split:
    """Neurons shuffled."""
    return _cut(torch.randperm(layout.neurons, generator=generator), layout)


def clustered(layout: Layout, profiles: Tensor, generator: torch.Generator) -> Split:
    """Shared are the neurons loudest on average; the others are clustered by when they are loud.

    `profiles` (neurons, tokens): |h|·‖W_d‖ of every neuron on some tokens.
    """
    order = profiles.mean(1).cpu().argsort(descending=True, stable=True)
    shared, rest = order[: layout.shared_neurons].sort().values, order[layout.shared_neurons :].sort().values
    shape = F.normalize(profiles[rest.to(profiles.device)], dim=1)  # when a neuron speaks up, however loud
    labels = balanced_kmeans(shape, layout.routed_sizes, generator)
    return Split(shared, tuple(rest[labels == expert] for expert in range(layout.routed)))


Splitter = Callable[[Layout, Tensor, torch.Generator], Split]
SPLITS: dict[str, Splitter] = {"clustered": clustered, "random": random, "contiguous": contiguous}


def _cut(order: Tensor, layout: Layout) -> Split:
    return Split(order[: layout.shared_neurons], order[layout.shared_neurons :].split(layout.routed_sizes))
