"""Weights that fade away while a block is matched, in place of vanishing before it begins.

Over the first part of the steps the block goes to its pattern: most of its zeros at once, by the method, whose survivors
make up for them; the rest in rounds, along the cubic schedule of gradual pruning (Zhu and Gupta, arXiv 1710.01878). What
scores least is 0 from then on, and the others go on moving towards the dense output. What a method makes up for at once
takes many steps to learn, so a short run leaves more to it. Scores are |w| ‖x‖ (Wanda, arXiv 2306.11695) of the weights as
they are by then, so the mask is made of what the block has learned to do without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from llmsparse.models.streamed import Block, Weight
from llmsparse.sparsity.partway import partway
from llmsparse.sparsity.patterns import Pattern

AT_ONCE = (0.9, 0.7)  # of the zeros, before the first step: of a run of SHORT steps at most, and from LONG on
SHORT, LONG = 50, 150
FADING = 0.7  # of the steps, until the pattern holds
ROUNDS = 30  # in which it is reached, at most


@dataclass(frozen=True)
class FadingWeight:
    """One weight that fades: what it comes to, and the norm of each of its inputs (in,)."""

    weight: Weight
    pattern: Pattern
    norm: Tensor


@dataclass(frozen=True)
class Fading:
    """The weights of a block that fade, and what they are before the first step: `beginning` on-disk key → tensor."""

    weights: Sequence[FadingWeight]
    beginning: Mapping[str, Tensor]

    def start(self, block: Block) -> dict[str, Tensor]:
        """Module parameter name → values before the first step; all tensors that make up a parameter are there."""
        return block.in_module(block.stored | dict(self.beginning))

    def keep(self, block: Block, values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """Module parameter name → keep-mask, after `share` of the zeros, for parameters that have these values now."""
        on_disk = block.on_disk(dict(values))
        keep = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in block.stored.items()}
        for one in self.weights:
            score = score_of(block.view(one.weight, on_disk), one.norm)  # (out, in)
            mask = partway(one.pattern, share).keep(score, slice(0, score.shape[1]), score.shape[1])
            block.view(one.weight, keep).copy_(mask)
        return {name: mask for name, mask in block.in_module(keep).items() if name in values}


def score_of(values: Tensor, norm: Tensor) -> Tensor:
    """|w| ‖x‖ (out, in); of an expert that no token reached |w| alone."""
    norm = norm.to(values.device)
    return values.abs() * torch.where(norm.any(), norm, 1.0)


def at_once(steps: int) -> float:
    """The share of the zeros that a run of `steps` begins with."""
    short, long = AT_ONCE
    return short + (long - short) * min(1.0, max(0.0, (steps - SHORT) / (LONG - SHORT)))


def rounds(steps: int) -> dict[int, float]:
    """Step → the share of the zeros that are there before it: 1 − (1 − at once)(1 − t/T)³ in rounds, all at FADING."""
    last = min(ceil(FADING * steps), steps - 1)
    every = max(1, ceil(last / ROUNDS))
    return {step: 1 - (1 - at_once(steps)) * (1 - step / last) ** 3 for step in range(0, last, every)} | {last: 1.0}
