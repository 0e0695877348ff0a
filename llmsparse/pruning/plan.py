"""What a run will do, decided and checked before a weight is read.

Everything that can be refused is refused here: a pattern against a shape, a rule or a glob that matches nothing, a
window too long, a full disk. `llmsparse plan` prints the result; `prune` carries it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from llmsparse.calibration.matching import HELD_OUT_SHARE, LEARNING_RATES, batches_per_step, probe_steps
from llmsparse.errors import RecipeError
from llmsparse.formats import stored_bytes
from llmsparse.models.streamed import StreamedModel
from llmsparse.packing.values import LARGEST, group_of
from llmsparse.pruning.allocation import Allocation, Search, Uniform
from llmsparse.pruning.allocation.exact import bounds_of
from llmsparse.pruning.allocation.units import Group, groups_of, levels_of, refuse_bounds
from llmsparse.pruning.block import PruneOptions
from llmsparse.pruning.memory import peak_bytes
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.pruning.selection import Choice, choose_weights
from llmsparse.runs.device import split_batches
from llmsparse.runs.joint import joint
from llmsparse.runs.memory import available_bytes
from llmsparse.runs.opening import fetched, open_model, read_windows
from llmsparse.runs.partial import held_bytes
from llmsparse.runs.plan import RunPlan
from llmsparse.sparsity.patterns import Pattern
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.disk import check_room, spell_size

PACKED_LAST = "; the dense checkpoint stands beside it until the run is done"
MATCH_STEPS = (300, 150, 75)  # of block matching by default: the most that is affordable, or none
MATCH_SECONDS_ON_CPU = 600
FLOPS_PER_THREAD = 30e9  # fp32 with gradients on one core; AVX2 measured at 34e9
STATISTICS_SHARE = 0.4  # of the memory that is free, for statistics held together


@dataclass(frozen=True, kw_only=True)
class PrunePlan(RunPlan[PruneRecipe]):
    """A pruning that has passed every check that needs no weights."""

    choices: dict[str, list[Choice]]  # block name → what is pruned in it
    match_steps: int
    packed_bytes: int  # what will be written in that format, as far as patterns alone can tell

    @property
    def resolved(self) -> PruneRecipe:
        return super().resolved.replace(match_steps=self.match_steps)

    @cached_property
    def batches(self) -> list[Tensor]:
        """As many at least as matching needs to hold some out."""
        size, width = self.recipe.batch_size, self.model.hidden_size
        return split_batches(self.windows.ids, size, self.device, width, least=HELD_OUT_SHARE)

    @property
    def allocation(self) -> Allocation:
        return self.recipe.allocator

    @property
    def allocates(self) -> bool:
        """Units get sparsities of their own."""
        return not isinstance(self.allocation, Uniform) and bool(self.units)

    @cached_property
    def units(self) -> list[Group]:
        """What shares one sparsity each."""
        return groups_of(self.choices, self.recipe.allocation_level)

    @property
    def allocated_sparsity(self) -> float:
        """Of all units together."""
        pattern = self.units[0].choices[0].pattern
        return cast(float, self.recipe.sparsity) if self.recipe.beside_dense else pattern.sparsity

    @property
    def bounds(self) -> tuple[float, float]:
        if self.recipe.allocation_bounds is None:
            return bounds_of(self.allocated_sparsity)
        low, high = self.recipe.allocation_bounds
        return low, high

    @property
    def levels(self) -> list[Pattern]:
        """The patterns that there are for a unit; none where any number of zeros will do."""
        mixed = self.recipe.sparsity if self.recipe.beside_dense else None
        return levels_of(self.units[0].choices[0].pattern, mixed)

    @cached_property
    def selected_keys(self) -> set[str]:
        return {choice.weight.key for choices in self.choices.values() for choice in choices}

    @cached_property
    def copied(self) -> list[str]:
        return [key for key in self.reader.keys() if key not in self.selected_keys]

    @cached_property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of everything that will be written: what the source holds."""
        return {key: (spec.shape, spec.dtype) for key in self.reader.keys() for spec in [self.reader.spec(key)]}

    @property
    def total_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape, _ in self.tensors.values())

    @cached_property
    def options(self) -> PruneOptions:
        """What the solver of a block is told; the budget is that of the moment when it is first asked for."""
        return PruneOptions(
            device=self.device,
            dtype=self.dtype,
            seed=self.recipe.seed,
            match_steps=self.match_steps,
            true_sequential=self.recipe.true_sequential,
            keep_zeros=self.recipe.keep_zeros,
            calibration_tokens=self.windows.ids.numel(),
            statistics_budget=int(STATISTICS_SHARE * available_bytes(self.device, self.ranks.local_size)),
        )

    @property
    def staging(self) -> str | None:
        """The packed form is made from the dense checkpoint."""
        return "dense" if self.recipe.format == "packed" else None

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | {"match steps": self.match_steps}

    def memory_bytes(self) -> int:
        return peak_bytes(self, self.options.statistics_budget)

    def to_json(self) -> dict[str, Any]:
        chosen = [choice for choices in self.choices.values() for choice in choices]
        return super().to_json() | {
            "methods": sorted({choice.method for choice in chosen}),
            "weights": [
                {"name": c.weight.name, "shape": c.weight.shape, "method": c.method, "pattern": str(c.pattern)}
                for c in chosen
            ],
            "parameters_to_prune": sum(math.prod(choice.weight.shape) for choice in chosen),
            "bytes_to_write": self.bytes_to_write if self.recipe.format == "dense" else self.packed_bytes,
            "format": self.recipe.format,
            "match_steps": self.match_steps,
        }

    def rows(self, plan: dict[str, Any]) -> dict[str, str]:
        patterns = sorted({weight["pattern"] for weight in plan["weights"]})
        return {
            "model": f"{plan['model']}, {plan['blocks']} blocks",
            "output": plan["output"],
            "prune": f"{len(plan['weights'])} weights, {plan['parameters_to_prune']:,} parameters, "
            f"by {', '.join(plan['methods'])} to {', '.join(patterns)}",
            "matching": f"{self.match_steps} steps a block" if self.match_steps else "off",
            **({"allocation": self._spell_allocation()} if self.allocates else {}),
            "format": f"{plan['format']}{PACKED_LAST if plan['format'] == 'packed' else ''}",
        }

    def _spell_allocation(self) -> str:
        name, level = type(self.allocation).__name__, self.recipe.allocation_level
        passes = self.allocation.generations if isinstance(self.allocation, Search) else 0
        more = passes + self.allocation.looks
        cost = (
            f", {more} more {'passes' if more > 1 else 'pass'} over the model, {spell_size(more * self.reader.nbytes)}"
        )
        return f"{name} over {len(self.units)} {level}s{cost if more else ''}"


@joint
def make_plan(
    recipe: PruneRecipe, *, resume: bool = False, overwrite: bool = False, download: bool = True
) -> PrunePlan:
    """Resolve and check everything a run needs, from headers and shapes alone, then read the calibration text.

    Last of all weights are downloaded that are not here yet, unless `download` is off: a plan needs none.
    """
    opened = open_model(recipe, resume=resume, overwrite=overwrite)
    reader = opened.reader
    choices = choose_weights(recipe, opened.model)
    needed = reader.nbytes
    _refuse_values(recipe, opened.model, choices)
    packed = packed_bytes(reader, choices, recipe.values)
    if recipe.format == "packed" and packed == needed:
        raise RecipeError(
            "--format packed: at this sparsity no weight would become smaller; prune more, or write dense"
        )
    check_room(opened.output, needed + (packed if recipe.format == "packed" else 0), held_bytes(opened.output))
    windows = read_windows(opened, recipe.calibration_samples)
    draft = PrunePlan(**opened.fields, windows=windows, choices=choices, match_steps=0, packed_bytes=packed)
    if draft.allocates:
        refuse_bounds(draft.allocated_sparsity, draft.bounds)
    draft = fetched(draft, download)
    return replace(
        draft, match_steps=default_match_steps(draft) if recipe.match_steps == "auto" else recipe.match_steps
    )


def default_match_steps(plan: PrunePlan) -> int:
    """Matching is on wherever it stays affordable: fully on any GPU, and on a CPU as far as minutes allow.

    The estimate counts, for each token and step, 2 operations forward and 4 backward for each parameter and for each
    product of attention.
    """
    if plan.device.type == "cuda":
        return MATCH_STEPS[0]
    width, (windows, tokens), most = plan.model.hidden_size, plan.batches[0].shape, len(plan.batches)
    parameters = sum(torch.Size(plan.tensors[key][0]).numel() for key in plan.selected_keys)
    products = parameters + 2 * len(plan.model.block_names) * tokens * width
    per_step = 6 * products * batches_per_step(windows, tokens, width, most=most) * windows * tokens
    for steps in MATCH_STEPS:
        total = steps + probe_steps(steps) * len(LEARNING_RATES)
        if total * per_step <= MATCH_SECONDS_ON_CPU * FLOPS_PER_THREAD * torch.get_num_threads():
            return steps
    return 0


def _refuse_values(recipe: PruneRecipe, model: StreamedModel, choices: Mapping[str, list[Choice]]) -> None:
    """RecipeError for bf16 values of weights that are stored otherwise: packing as such rounds nothing."""
    if recipe.values == "bf16":
        for choice in (choice for members in choices.values() for choice in members):
            if (dtype := model.dtype_of(choice.weight)) != torch.bfloat16:
                raise RecipeError(
                    f"--values bf16: {choice.weight.name} is stored in {str(dtype).removeprefix('torch.')}; leave --values "
                    "out to store values as they are"
                )


def packed_bytes(reader: CheckpointReader, choices: Mapping[str, list[Choice]], values: str | None = None) -> int:
    """Bytes of the whole checkpoint with every chosen weight packed that gains by it; with values of 8 or 4 bits at most."""
    total = reader.nbytes
    for choice in (choice for members in choices.values() for choice in members):
        numel, dtype = math.prod(choice.weight.shape), reader.spec(choice.weight.key).dtype
        nnz = numel - round(choice.pattern.sparsity * numel)
        described = {"shape": choice.weight.shape, "nnz": nnz, "pattern": str(choice.pattern)}
        packed = stored_bytes(described | {"dtype": str(dtype).removeprefix("torch.")})
        if values in LARGEST:
            steps = 2 * numel // group_of(values, choice.weight.shape[1])
            packed = numel // 8 + nnz * (LARGEST[values].bit_length() + 1) // 8 + steps
        total -= max(0, numel * dtype.itemsize - packed)
    return total
