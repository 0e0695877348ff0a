"""Which weights are pruned, and how each: globs over on-disk names (without `.weight`), and a recipe's rules.

Which names a glob selects: `calibration/selection.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsparse.calibration.selection import matching_weights
from llmsparse.models.prunable import refuse_flat_experts, refuse_shared_blocks, refuse_stored
from llmsparse.models.streamed import HEAD, StreamedModel, Weight
from llmsparse.pruners import Pruner
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.sparsity.patterns import Pattern


@dataclass(frozen=True)
class Choice:
    """One weight, and how it will be pruned."""

    weight: Weight
    pruner: Pruner
    method: str
    pattern: Pattern
    ruled: bool = False  # a rule of the recipe gives it this sparsity or pattern


def choose_weights(recipe: PruneRecipe, model: StreamedModel) -> dict[str, list[Choice]]:
    """Which weights of each block are pruned, how, and to which pattern; the output head stands under its own name.

    CheckpointError for a model whose weights cannot be pruned one by one, RecipeError for a choice that cannot be.
    """
    refuse_shared_blocks(model)
    refuse_flat_experts(model)
    blocks: dict[str, list[Weight]] = {name: model.weights(i) for i, name in enumerate(model.block_names)}
    blocks[HEAD] = model.head_weights()
    weights = [weight for block in blocks.values() for weight in block]
    selected = matching_weights(
        weights, only=recipe.only, include=recipe.include, exclude=recipe.exclude, tied=model.tied_head
    )
    recipe.check_rules([weight.name for weight in selected])
    refuse_stored(model.folder, ((weight.key, model.dtype_of(weight)) for weight in selected))
    names = {weight.name for weight in selected}
    choices: dict[str, list[Choice]] = {}
    for block, members in blocks.items():
        choices[block] = []
        for weight in members:
            if weight.name in names:
                pattern = recipe.pattern_for(weight.name)
                pattern.check(weight.name, weight.shape)
                pruner = recipe.pruner_for(weight.name)
                ruled = recipe.rules_sparsity_of(weight.name)
                choices[block].append(Choice(weight, pruner, recipe.method_for(weight.name), pattern, ruled))
    return choices
