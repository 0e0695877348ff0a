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

from llmsparse.calibration.matching import HELD_OUT_SHARE
from llmsparse.errors import RecipeError
from llmsparse.formats import stored_bytes
from llmsparse.models.streamed import StreamedModel
from llmsparse.packing.values import LARGEST, group_of
from llmsparse.pruners import spec as methods
from llmsparse.pruning.allocation import ALLOCATIONS, Allocation, Search, Uniform
from llmsparse.pruning.allocation.exact import bounds_of
from llmsparse.pruning.allocation.units import Group, groups_of, levels_of, refuse_bounds
from llmsparse.pruning.duration import default_match_steps, seconds_by_effort, spell_seconds
from llmsparse.pruning.effort import EFFORTS, UNIFORM_UP_TO
from llmsparse.pruning.memory import peak_bytes
from llmsparse.pruning.options import PruneOptions
from llmsparse.pruning.permutation.fold import Fold, folds_of, why_nothing_folds
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
STATISTICS_SHARE = 0.4  # of the memory that is free, for statistics held together


@dataclass(frozen=True, kw_only=True)
class PrunePlan(RunPlan[PruneRecipe]):
    """A pruning that has passed every check that needs no weights."""

    choices: dict[str, list[Choice]]  # block name → what is pruned in it
    match_steps: int
    packed_bytes: int  # what will be written in that format, as far as patterns alone can tell
    folding: bool = True  # inputs of some matrix fold, as far as is known

    @property
    def resolved(self) -> PruneRecipe:
        name = methods.name_in(ALLOCATIONS, self.allocation)
        assert name is not None
        decided = {
            "match_steps": self.match_steps,
            "refine": self.refinement,
            "permute": "auto" if self.folds else self.recipe.permute,
            "allocation": methods.described(name, self.allocation),
        }
        return super().resolved.replace(**decided)

    @property
    def fading(self) -> bool:
        """Masks are made while blocks are matched: by default where a method looks at the calibration text at all."""
        if self.recipe.refine != "auto":
            return self.recipe.refine == "fading"
        effort = EFFORTS[self.recipe.effort]
        return self.match_steps > 0 and effort.refine == "fading" and self.recipe.pruner.needs is not None

    @cached_property
    def batches(self) -> list[Tensor]:
        """As many at least as matching needs to hold some out."""
        size, width = self.recipe.batch_size, self.model.hidden_size
        return split_batches(self.windows.ids, size, self.device, width, least=HELD_OUT_SHARE)

    @property
    def refinement(self) -> str:
        """What becomes of a method's mask."""
        return self.recipe.refine if self.recipe.refine != "auto" else "fading" if self.fading else "none"

    @cached_property
    def allocation(self) -> Allocation:
        """As asked; by default what the effort has where it is left to decide, and blocks are not matched."""
        recipe = self.recipe
        unmatched = recipe.match_steps == "auto" and self.match_steps == 0
        if recipe.allocation != "auto" or recipe.pattern != "unstructured" or not unmatched:
            return recipe.allocator
        return ALLOCATIONS[EFFORTS[recipe.effort].beyond if (recipe.sparsity or 0) > UNIFORM_UP_TO else "uniform"]()

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
    def folds(self) -> dict[str, list[Fold]]:
        """Block → matrices whose inputs may be reordered; nothing where they are left as they are.

        Left open, they are where blocks are matched, which takes longer than to find an order, and no zeros are to stay.
        """
        asked = self.recipe.permute
        by_effort = EFFORTS[self.recipe.effort].permutes and self.match_steps > 0 and not self.recipe.keep_zeros
        if not (asked == "auto" or (asked is None and by_effort)) or not self.folding:
            return {}
        found = folds_of(self.model, self.choices)
        if asked == "auto" and not any(found.values()):
            raise RecipeError(f"--permute auto: nothing folds: {why_nothing_folds(self.choices)}")
        return found if any(found.values()) else {}

    @cached_property
    def selected_keys(self) -> set[str]:
        """Of what is made, and not copied."""
        moved = {key for folds in self.folds.values() for fold in folds for key in fold.keys}
        return moved | {choice.weight.key for choices in self.choices.values() for choice in choices}

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
            fading=self.fading,
            model=self.model,
            folds=self.folds,
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
        return super().fingerprint | {"match steps": self.match_steps, "fading": self.fading}

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
            "refine": self.refinement,
            "seconds": seconds_by_effort(self),
            **({"permute": self._may_fold} if self.folds else {}),
        }

    def rows(self, plan: dict[str, Any]) -> dict[str, str]:
        patterns = sorted({weight["pattern"] for weight in plan["weights"]})
        return {
            "model": f"{plan['model']}, {plan['blocks']} blocks",
            "output": plan["output"],
            "prune": f"{len(plan['weights'])} weights, {plan['parameters_to_prune']:,} parameters, "
            f"by {', '.join(plan['methods'])} to {', '.join(patterns)}",
            "matching": f"{self.match_steps} steps a block{', weights fading' if self.fading else ''}"
            if self.match_steps
            else "off",
            **({"takes": spell_seconds(plan["seconds"])} if plan["seconds"] else {}),
            **(
                {"permute": f"inputs of {len(self._may_fold)} matrices, {self._may_fold[0]} first, where that folds"}
                if self.folds
                else {}
            ),
            **({"allocation": self._spell_allocation()} if self.allocates else {}),
            "format": f"{plan['format']}{PACKED_LAST if plan['format'] == 'packed' else ''}",
        }

    @property
    def _may_fold(self) -> list[str]:
        return [fold.name for folds in self.folds.values() for fold in folds]

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
    _ = draft.folds  # refused before anything is fetched
    if draft.allocates:
        refuse_bounds(draft.allocated_sparsity, draft.bounds)
    draft = fetched(draft, download)
    steps = default_match_steps(draft) if recipe.match_steps == "auto" else recipe.match_steps
    if recipe.refine == "fading" and not steps:
        raise RecipeError("refine fading: matching is not affordable here, so nothing can fade; give --match-steps 200")
    return replace(draft, match_steps=steps)


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
