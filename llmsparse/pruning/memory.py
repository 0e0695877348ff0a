"""What a pruning holds in memory at its peak, term by term.

A run goes through phases that follow one another: the ids are embedded, block after block is calibrated, solved and
matched, and at the end the logits are made. The peak is that of the largest phase, beside what is there throughout.
On a CPU what is stored counts too; on a GPU only what is put there. What a method works with it says itself
(`Pruner.workspace`). tests/pruning/test_memory_estimate.py holds the sum against real runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmsparse.calibration.inputs import EXPERT_ROWS, sample_rows
from llmsparse.calibration.matching import batches_per_step
from llmsparse.calibration.matching_loss import HELD_LOGITS, LOGITS_AT_ONCE
from llmsparse.models.likelihood import LOGIT_ELEMENTS
from llmsparse.models.weight import Slot
from llmsparse.pruners import workspace_of
from llmsparse.pruning.permutation.order import ROWS
from llmsparse.pruning.selection import HEAD, Choice
from llmsparse.ranks.tree import LEAVES, held_at_once
from llmsparse.runs.memory import freed_bytes
from llmsparse.sparsity.stats import Gram, Statistic, combine

if TYPE_CHECKING:
    from llmsparse.pruning.plan import PrunePlan

HELD_FORWARD = 4  # numbers of a token in a block's forward at once, in widest products (the FFN's): measured
HELD_BACKWARD = 12  # the same of a forward whose backward is to come
SEARCHED = 12  # bytes a weight whose inputs are reordered: as it was squared, by norms, and by pieces
FADING = 3  # bytes a weight that fades: its mask, the next one, and what may not fade
MATCHED = (
    16  # bytes a tuned weight: fp32 master, two moments, and the best so far; gradients are held besides, in a tree
)


def peak_bytes(plan: PrunePlan, statistics_budget: int) -> int:
    """An estimate of the most that `prune` will hold: of anonymous memory on a CPU, of allocated memory on a GPU."""
    blocks = [
        _Block(plan, plan.choices[name], plan.model.block_keys(index), statistics_budget)
        for index, name in enumerate(plan.model.block_names)
    ]
    if head := plan.choices[HEAD]:
        blocks.append(_Block(plan, head, sorted({choice.weight.key for choice in head}), statistics_budget))
    stored = sorted(block.stored for block in blocks)
    neighbours = sum(stored[-3:-1])  # the block that is read ahead, and the last one, which is being written
    phases = [_embedding(plan), _logits(plan), *(neighbours + block.peak for block in blocks)]
    return plan.footprint + _activations(plan) + freed_bytes(plan.device, stored[-1]) + max(phases)


def _activations(plan: PrunePlan) -> int:
    """Hidden states of the calibration windows, and of the held-out ones through the source and through what is made; where
    blocks are matched, of the calibration windows through the source, too."""
    tokens = (2 if plan.match_steps else 1) * _held_here(plan, plan.batches) + 2 * _held_here(plan, plan.held_out)
    rotary = 2 * plan.windows.ids.shape[1] * plan.model.hidden_size  # call arguments: cos and sin, at most so wide
    return (tokens * plan.model.hidden_size + rotary) * plan.dtype.itemsize


def _held_here(plan: PrunePlan, batches: Sequence[Tensor]) -> int:
    """Tokens of those batches that one process holds, at most; all of them if it is alone."""
    return plan.share_of(batches).most_tokens if batches else 0


def _embedding(plan: PrunePlan) -> int:
    """The embedding in the compute dtype, and what it is made of; dropped before the first block. The head is as large."""
    stored = max((_stored_bytes(plan, [key]) for key in plan.model.outside_keys), default=0)
    return _head(plan) + stored


def _head(plan: PrunePlan) -> int:
    return plan.model.vocabulary * plan.model.hidden_size * plan.dtype.itemsize


def _logits(plan: PrunePlan) -> int:
    """The head, and a chunk of logits: as the model makes them, in fp32 if that is another, and their softmax."""
    if not plan.held_out:
        return 0
    tokens = plan.held_out[0].numel()
    numbers = min(max(LOGIT_ELEMENTS, plan.model.vocabulary), tokens * plan.model.vocabulary)
    return _head(plan) + numbers * (_with_fp32(plan.dtype) + 4)


def _stored_bytes(plan: PrunePlan, keys: Sequence[str]) -> int:
    """Of tensors as they are on disk; nothing on a GPU, where they never are."""
    specs = [plan.reader.spec(key) for key in keys]
    return sum(spec.end - spec.begin for spec in specs) if plan.device.type == "cpu" else 0


def _with_fp32(dtype: torch.dtype) -> int:
    """Bytes a number of something in the compute dtype and its copy in fp32, which is itself where it is fp32."""
    return dtype.itemsize if dtype == torch.float32 else dtype.itemsize + 4


@dataclass(frozen=True)
class _Block:
    """A block while it is worked on."""

    plan: PrunePlan
    choices: list[Choice]
    keys: list[str]
    statistics_budget: int

    @property
    def stored(self) -> int:
        return _stored_bytes(self.plan, self.keys)

    @property
    def peak(self) -> int:
        """Beside its neighbours."""
        if not self.choices:
            return self._loaded
        solving = self._summed + max(self._whole + self._solving(choice) for choice in self.choices)
        measuring = self._samples + max(self._statistics + self._calibrating, solving)
        return self._loaded + max(self._masks + self._dense + max(measuring, self._matching), self._reordering)

    @property
    def _reordering(self) -> int:
        """The energy of one matrix, by channels and sorted too, and what the search keeps of some of its rows; then what
        moves, as it was and as it becomes."""
        folds = [fold for folds in self.plan.folds.values() for fold in folds if set(fold.keys) <= set(self.keys)]
        searched = [
            SEARCHED * out * width + 12 * min(out, ROWS) * width for out, width in (fold.matrix for fold in folds)
        ]
        moved = [2 * _stored_bytes(self.plan, fold.keys) for fold in folds]
        return max(max(searched, default=0) + self._calibrating if folds else 0, *moved, 0)

    @property
    def _loaded(self) -> int:
        """The module in the compute dtype, and what it was made of."""
        numel = sum(prod(self.plan.reader.spec(key).shape) for key in self.keys)
        return numel * self.plan.dtype.itemsize + self.stored

    @cached_property
    def _chosen(self) -> int:
        """Weights that are pruned."""
        return sum(prod(choice.weight.shape) for choice in self.choices)

    @property
    def _masks(self) -> int:
        """A byte a weight, on the CPU until matching is done."""
        return self._chosen if self._matched and self.plan.device.type == "cpu" else 0

    @property
    def _dense(self) -> int:
        """What weights were before, where they are to fade from there."""
        return self.stored if self._matched and self.plan.fading else 0

    @cached_property
    def _entering(self) -> dict[tuple[Slot, int], type[Statistic] | None]:
        """Inputs by where they enter and their width → what is measured of them. Weights that share one (q, k and v) are
        known only once the block has run, so this is an upper bound."""
        found: dict[tuple[Slot, int], type[Statistic] | None] = {}
        for choice in self.choices:
            place = (choice.weight.slot, choice.weight.shape[1])
            found[place] = combine(found.get(place), choice.pruner.needs)
        return found

    @property
    def _statistics(self) -> int:
        """Those measured in one pass: as many as the budget allows, at least one, and just one if true-sequential; while
        they are summed up, in a tree."""
        sizes = [self._held * needs.nbytes(width) for (_, width), needs in self._entering.items() if needs]
        budget = 0 if self.plan.recipe.true_sequential else self.statistics_budget
        return max(min(sum(sizes), budget), max(sizes, default=0))

    @property
    def _held(self) -> int:
        """Partial sums at once."""
        return self._sums(len(self.plan.batches))

    def _sums(self, batches: int) -> int:
        """Partial sums at once over so many batches of all processes: a process's own, and one that comes from another."""
        size = self.plan.ranks.size
        return held_at_once(-(-min(LEAVES, batches) // size)) + (size > 1)

    @property
    def _summed(self) -> int:
        """The same once they are summed up."""
        return self._statistics // self._held

    @property
    def _whole(self) -> int:
        """The largest matrix of products, as it is solved with, without the half that it was summed up as."""
        widths = [width for (_, width), needs in self._entering.items() if needs and issubclass(needs, Gram)]
        return max((4 * width**2 - Gram.nbytes(width) for width in widths), default=0)

    @property
    def _samples(self) -> int:
        """Rows of every input, in the compute dtype, to measure output errors on."""
        rows = sum(self._rows(slot) * width for slot, width in self._entering)
        return rows * self.plan.dtype.itemsize

    def _rows(self, slot: Slot) -> int:
        return sample_rows(self.plan.windows.ids.numel()) if slot[1] is None else EXPERT_ROWS

    @property
    def _calibrating(self) -> int:
        """The forward of a batch, and what a statistic makes of its widest input: a copy in fp32, and its square."""
        measured = 2 * 4 * self._widest if any(self._entering.values()) else 0
        return self._tokens * ((HELD_FORWARD * self._widest) * self.plan.dtype.itemsize + measured)

    def _solving(self, choice: Choice) -> int:
        """One weight in fp32, and what the method works with; or what it made, its difference, and the outputs of the
        sampled rows through both, which are squared."""
        (out, width), rows = choice.weight.shape, self._rows(choice.weight.slot)
        compared = 9 * out * width + rows * (width * _with_fp32(self.plan.dtype) + 2 * 4 * out)
        return 4 * out * width + max(workspace_of(choice.pruner, out, width), compared)

    @property
    def _matching(self) -> int:
        """What Adam moves and remembers, masks of what it may move, and a step: the forward of a batch with all that its
        backward needs, or the temporaries of the update."""
        if not self._matched:
            return 0
        numbers, cast = self._tokens * HELD_BACKWARD * self._widest, self._chosen * self.plan.dtype.itemsize
        step = numbers * 4 + (cast if self.plan.dtype != torch.float32 else 0)
        largest = max(prod(choice.weight.shape) for choice in self.choices)
        update = 4 * (largest if self.plan.device.type == "cpu" else self._chosen)
        count, (windows, tokens) = len(self.plan.batches), self.plan.batches[0].shape
        together = batches_per_step(windows, tokens, self.plan.model.hidden_size, most=count)
        fading = FADING if self.plan.fading else 0
        tuned = (MATCHED + 4 * self._sums(together) + 1 + fading) * self._chosen
        return tuned + max(step + self._judging, update)

    @property
    def _judging(self) -> int:
        """Behind the last block: the head, and logits of what the block should come to and of what it does."""
        if self.keys != self.plan.model.block_keys(len(self.plan.model.block_names) - 1):
            return 0
        return _head(self.plan) + 4 * HELD_LOGITS * min(LOGITS_AT_ONCE, self._tokens * self.plan.model.vocabulary)

    @property
    def _matched(self) -> bool:
        """Nothing comes after the head that its output could be matched by."""
        return bool(self.plan.match_steps) and self.choices[0].weight.kind != HEAD

    @property
    def _tokens(self) -> int:
        """Of a batch."""
        return self.plan.batches[0].numel()

    @property
    def _widest(self) -> int:
        """The most numbers that a token is made into at once. An expert sees few tokens, and logits are not made."""
        linear = [
            choice.weight for choice in self.choices if choice.weight.slot[1] is None and choice.weight.kind != HEAD
        ]
        shapes = [weight.shape for weight in linear]
        return max((size for shape in shapes for size in shape), default=self.plan.model.hidden_size)
