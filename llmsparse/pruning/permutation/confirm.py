"""Before a file is made: whether the inputs of any matrix fold, tried out block by block until one does."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from llmsparse.errors import RecipeError
from llmsparse.pruning.permutation.trial import folding_layout
from llmsparse.runs.run import Run

if TYPE_CHECKING:
    from llmsparse.pruning.plan import PrunePlan

NOTED = "folding"


def confirmed(run: Run[PrunePlan]) -> PrunePlan:
    """The plan as it is, or without an order where nothing folds; RecipeError if one was asked for."""
    plan = run.plan
    if not plan.folds:
        return plan
    folding: bool = run.fact(NOTED, lambda: {"any": plan.ranks.known(lambda: _any_folds(plan))})["any"]
    if not folding and plan.recipe.permute == "auto":
        first = next(fold.name for folds in plan.folds.values() for fold in folds)
        raise RecipeError(
            f"--permute auto: nothing folds: what enters {first} does not follow when the outputs beside it change places, as "
            "with all matrices tried; leave it out"
        )
    return replace(plan, folding=folding)


@torch.no_grad()
def _any_folds(plan: PrunePlan) -> bool:
    acts = plan.model.embed(plan.batches[:1])
    with closing(plan.model.blocks()) as blocks:
        for block in blocks:
            if any(folding_layout(block, acts, fold) is not None for fold in plan.folds[block.name]):
                return True
            block.run(acts, into=acts)
    return False
