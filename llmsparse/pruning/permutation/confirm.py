"""Before a file is made: whether the inputs of any matrix fold, tried out block by block until one does."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import torch

from llmsparse.errors import RecipeError
from llmsparse.pruning.permutation.trial import folding_layout
from llmsparse.runs.run import Run

if TYPE_CHECKING:
    from llmsparse.pruning.plan import PrunePlan


def confirmed(run: Run[PrunePlan]) -> PrunePlan:
    """The plan as it is. RecipeError where inputs are to be reordered, and nothing folds."""
    plan = run.plan
    if plan.folds and not run.has(plan.model.block_names[0]):
        plan.ranks.known(lambda: _refuse_unfolding(plan))
    return plan


@torch.no_grad()
def _refuse_unfolding(plan: PrunePlan) -> None:
    acts = plan.model.embed(plan.batches[:1])
    with closing(plan.model.blocks()) as blocks:
        for block in blocks:
            if any(folding_layout(block, acts, fold) is not None for fold in plan.folds[block.name]):
                return
            block.run(acts, into=acts)
    first = next(fold.name for folds in plan.folds.values() for fold in folds)
    raise RecipeError(
        f"--permute auto: nothing folds: what enters {first} does not follow when the outputs beside it change places, as with "
        "all matrices tried; leave it out"
    )
