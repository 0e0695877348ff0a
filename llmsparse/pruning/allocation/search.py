"""Search for sparsities by the loss of the whole model, pruned by Wanda's scores, on windows of the calibration text.

An error behind a block says little of what the rest of the network makes of it; the loss at its end does. Candidates are
run side by side, so that a generation costs one pass over the model. The first generation holds uniform, ramps over the
depth both ways (as ATP, arXiv:2502.10201, has them) and random ones; the next ones are the best so far with some zeros
moved from one unit to another (as EvoPress, arXiv:2410.14649, does). Without `evolve` every candidate is random: the
baseline that an allocation has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.pruning.allocation.exact import bounded
from llmsparse.pruning.allocation.protocol import Unit
from llmsparse.sparsity.stats import InputNorm, Statistic

PARENTS = 4  # of the candidates so far, the best, that others are made from
MOVES = 3  # zeros are moved between so many pairs of units, at most, to make one candidate of another
Candidate = list[float]  # a sparsity for each unit


class Found(NamedTuple):
    """A candidate and its loss, in nats a token."""

    loss: float
    sparsities: Candidate


@dataclass(frozen=True)
class Search:
    """`generations` passes of so many `candidates` each; no unit moves by much more than `spread` at once."""

    generations: int = 6
    candidates: int = 16
    spread: float = 0.12
    evolve: bool = True

    def __post_init__(self) -> None:
        if self.generations < 1 or self.candidates < 1 or not 0 < self.spread < 1:
            raise ValueError("wanted at least 1 generation of 1 candidate, and a spread between 0 and 1")

    @property
    def needs(self) -> type[InputNorm]:
        return InputNorm

    @property
    def looks(self) -> bool:
        return True

    def look(self, weight: Tensor, stat: Statistic | None) -> Tensor:
        """The norms that Wanda's scores are made with, (in,) fp32."""
        assert isinstance(stat, InputNorm)
        return stat.norm.cpu()

    def judge(self, seen: Sequence[Any]) -> float:
        return 0.0

    def sparsities(self, judged: Sequence[float], units: Sequence[Unit], sparsity: float) -> list[float]:
        raise NotImplementedError  # of one pass alone it knows nothing: see `run`

    def run(
        self,
        units: Sequence[Unit],
        sparsity: float,
        bounds: tuple[float, float],
        generator: torch.Generator,
        losses: Callable[[list[Candidate]], list[float]],
    ) -> Found:
        """The candidate of the smallest loss; `losses` runs a generation of them."""
        sizes = [unit.numel for unit in units]

        def possible(wished: Candidate) -> Candidate:
            return bounded(wished, sizes, sparsity, *bounds)

        found: list[Found] = []
        for generation in range(self.generations):
            if generation == 0:
                wished = self._first(len(units), sparsity, generator)
            elif self.evolve:
                parents = [one.sparsities for one in sorted(found)[:PARENTS]]
                wished = [self._child(parents[n % len(parents)], sizes, generator) for n in range(self.candidates)]
            else:
                wished = [self._random(len(units), sparsity, generator) for _ in range(self.candidates)]
            candidates = [possible(one) for one in wished]
            found += [Found(*pair) for pair in zip(losses(candidates), candidates, strict=True)]
        return min(found)

    def _first(self, count: int, sparsity: float, generator: torch.Generator) -> list[Candidate]:
        places = [2 * n / max(1, count - 1) - 1 for n in range(count)]  # −1 … 1 over the depth
        ramps = [factor * self.spread for factor in (0.5, -0.5, 1.0, -1.0)] if self.evolve else []
        known = [[sparsity] * count, *([sparsity + slope * place for place in places] for slope in ramps)]
        others = range(max(0, self.candidates - len(known)))
        return [*known, *(self._random(count, sparsity, generator) for _ in others)][: self.candidates]

    def _random(self, count: int, sparsity: float, generator: torch.Generator) -> Candidate:
        moved: list[float] = (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1).tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return [sparsity + self.spread * value for value in moved]

    def _child(self, parent: Candidate, sizes: Sequence[int], generator: torch.Generator) -> Candidate:
        """Some zeros moved from one unit to another, a few times."""
        child = list(parent)
        for _ in range(1 + int(torch.randint(MOVES, (), generator=generator))):
            giver, taker = (int(n) for n in torch.randint(len(child), (2,), generator=generator))
            amount = self.spread * float(torch.rand((), generator=generator))
            child[giver] -= amount
            child[taker] += amount * sizes[giver] / sizes[taker]
        return child
