"""Which weights are pruned, and how each: globs over on-disk names (without `.weight`), and a recipe's rules.

The default is every matrix that a block multiplies activations with; the model says what that is (`Weight.prunable`).
`only` restricts, `include` adds, `exclude` removes, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from llmsparse.errors import RecipeError, did_you_mean
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


def matching_weights(
    weights: Sequence[Weight],
    *,
    only: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tied: str | None = None,
) -> list[Weight]:
    """The weights to prune, in their given order.

    `tied` names an output head that is the input embedding, which is why it is not among the weights.
    Raises RecipeError for a glob that matches nothing, for an `include` of what cannot be pruned, and when nothing
    is left.
    """
    names = [weight.name for weight in weights]
    for option, globs in (("only", only), ("include", include), ("exclude", exclude)):
        for glob in globs:
            if any(fnmatchcase(name, glob) for name in names):
                continue
            if tied is not None and fnmatchcase(tied, glob):
                raise RecipeError(
                    f"--{option} {glob!r}: {tied} is tied to the input embedding, which is not pruned; leave it out"
                )
            raise RecipeError(f"--{option} {glob!r} matches none of {len(names)} weights{_example(glob, names)}")

    def chosen(weight: Weight) -> bool:
        included = any(fnmatchcase(weight.name, glob) for glob in include)
        default = weight.prunable and (not only or any(fnmatchcase(weight.name, glob) for glob in only))
        return (default or included) and not any(fnmatchcase(weight.name, glob) for glob in exclude)

    selected = [weight for weight in weights if chosen(weight)]
    if not selected:
        raise RecipeError(
            f"nothing is left to prune: --only, --include and --exclude select none of {len(names)} weights; "
            "see their names with `llmsparse inspect MODEL`"
        )
    return selected


def _example(glob: str, names: Sequence[str]) -> str:
    hint = did_you_mean(glob, list(names)).split(" known:")[0].rstrip(";")
    return hint or f"; a name looks like {names[0]!r}"
