"""The layers of a block that is being measured, with samples of what enters them: for a share the rule that leaves out as much.

The experts of a mixture are one layer, whose matrices have a threshold and a centre each, of the tokens routed to them; those
that few tokens reach are given what reached the others.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from llmsparse.calibration.inputs import Input
from llmsparse.cutting.recipe import ActivationsRecipe
from llmsparse.errors import LlmsparseError
from llmsparse.models.cut_block import weights_of
from llmsparse.models.streamed import Block, Slot
from llmsparse.models.thresholds import Applied, Rule, folded
from llmsparse.sparsity.activation import Cut, column_norms, scores, threshold_at

FEW = 64  # rows of an expert's sample; with fewer its layer's stands in
POOLED = 1024  # rows of a layer's
QUICK = 512  # rows that a threshold is looked up in while shares are sought


class Layers:
    """By name in the block, in call order."""

    def __init__(self, block: Block, recipe: ActivationsRecipe, inputs: Sequence[Input]) -> None:
        self._block, self._recipe = block, recipe
        self.inputs: dict[str, list[Input]] = {}  # layer → what enters it; of experts an input each
        for entry in inputs:
            for slot in entry.slots:
                self.inputs.setdefault(_name_of(slot), []).append(entry)
        self._parts: dict[str, list[_Part]] = {}
        self._experts = {_name_of(slot) for entry in inputs for slot in entry.slots if slot[1] is not None}

    def beside(self, name: str) -> list[str]:
        """The layers that what enters this one enters too, itself among them."""
        found = {id(entry) for entry in self.inputs[name]}
        return [other for other, entries in self.inputs.items() if found & set(map(id, entries))]

    def take(self, names: Sequence[str]) -> None:
        """Learn from the samples of what enters these layers, which are let go of."""
        samples: dict[int, Tensor | None] = {}
        for entry in (entry for name in names for entry in self.inputs[name]):
            if id(entry) not in samples:
                samples[id(entry)] = entry.sample if entry.rows else None
                entry.rows.clear()
        for name in names:
            reached = {
                slot[1]: samples[id(one)] for one in self.inputs[name] for slot in one.slots if _name_of(slot) == name
            }
            self._parts[name] = self._learn(name, reached)

    def forget_samples(self) -> None:
        """Let go of what was learned from; rules are looked up no more until it is taken anew."""
        for part in (part for parts in self._parts.values() for part in parts):
            part.forget()

    def sizes(self, tokens: int) -> dict[str, int]:
        """Weights that a token is multiplied with, on average of so many; of experts those it is routed to."""
        return {name: max(1, round(prod(self.shape(name)) * self.met(name, tokens))) for name in self.inputs}

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in), of each expert."""
        out, width = weights_of(self._block.module, name)[0].shape
        return out, width

    def met(self, name: str, tokens: int) -> float:
        """How many matrices of the layer a token meets, on average of so many: 1, of experts those it is routed to, whether they
        are one layer or a layer each."""
        return sum(entry.tokens for entry in self.inputs[name]) / tokens

    def rule(self, name: str, share: float, exact: bool) -> Rule:
        """The rule by which a layer leaves out a share of its sample; `exact`, or as a sorted part of it says."""
        made = tuple(part.applied(share, exact) for part in self._parts[name])
        return made if name in self._experts else made[0]

    def means(self) -> dict[str, Tensor]:
        """Layer → what stands for inputs that are left out, (in,) or (experts, in), by the last rule of each."""
        found = {name: [part.mean for part in parts if part.mean is not None] for name, parts in self._parts.items()}
        return {
            name: torch.stack(means) if name in self._experts else means[0] for name, means in found.items() if means
        }

    def _learn(self, name: str, reached: dict[int | None, Tensor | None]) -> list[_Part]:
        rows = [sample for sample in reached.values() if sample is not None]
        if not rows:
            wanted = next(weight.name for entry in self.inputs[name] for weight in entry.weights)
            raise LlmsparseError(f"no calibration token reached {wanted}; leave it out with --exclude {wanted!r}")
        weights = weights_of(self._block.module, name)
        if name not in self._experts:
            return [_Part(weights[0], rows[0], self._recipe, QUICK)]
        pool = torch.cat(rows)
        pool = pool[:: -(-len(pool) // POOLED)].clone()  # a view would keep them all
        made: list[_Part] = []
        for expert, weight in enumerate(weights):
            sample = reached.get(expert)
            own = pool if sample is None or len(sample) < min(FEW, len(pool)) else sample
            made.append(_Part(weight, own, self._recipe, -(-QUICK // len(weights))))
        return made


def described(rule: Rule) -> dict[str, Any]:
    """A rule as it stands in config.json."""
    if isinstance(rule, Applied):
        return rule.cut.described()
    first = rule[0].cut.described()
    return first if "keep" in first else {"threshold": [one.cut.threshold for one in rule]}


class _Part:
    """One matrix, and a sample (rows, in) of what enters it."""

    def __init__(self, weight: Tensor, sample: Tensor, recipe: ActivationsRecipe, quick: int) -> None:
        self._weight, self._sample, self._recipe, self._quick = weight, sample, recipe, quick
        self._norms = column_norms(weight) if recipe.score == "wina" else None
        self.mean: Tensor | None = None
        self._added: Tensor | None = None
        if recipe.bias == "centre":
            self.mean = sample.float().median(dim=0).values
            self._added = folded(weight, self.mean)
        self._sorted: Tensor | None = None

    def forget(self) -> None:
        self._sample = self._sample.new_empty(0, self._sample.shape[1])
        self._sorted = None

    def applied(self, share: float, exact: bool) -> Applied:
        centre = self.mean if self._recipe.bias == "centre" else None
        if self._recipe.rule == "topk":
            cut = Cut(keep=round((1 - share) * self._sample.shape[1]), norms=self._norms, centre=centre)
        else:
            cut = Cut(threshold=self._threshold(share, centre, exact), norms=self._norms, centre=centre)
        if self._recipe.bias == "fold":
            self.mean = (self._sample.float() - cut(self._sample).float()).mean(0)
            self._added = folded(self._weight, self.mean)
        return Applied(cut, self._added)

    def _threshold(self, share: float, centre: Tensor | None, exact: bool) -> float:
        def found() -> Tensor:
            moved = self._sample if centre is None else (self._sample.float() - centre).to(self._sample.dtype)
            return scores(moved, self._norms)

        if exact:
            return threshold_at(found(), share)
        if self._sorted is None:
            every = max(1, len(self._sample) // self._quick)
            self._sorted = found()[::every].flatten().sort().values
        count = round(share * self._sorted.numel())
        return self._sorted[count - 1].item() if count else -1.0


def _name_of(slot: Slot) -> str:
    return slot[0].removesuffix(".weight")
