"""The reductions there are, in the order in which they cut a block."""

from __future__ import annotations

from collections.abc import Callable

from llmsparse.shrinking import blocks, experts, ffn, heads
from llmsparse.shrinking.recipe import ShrinkRecipe
from llmsparse.shrinking.reduction import Reduction, Source

ORDER: dict[str, Callable[[ShrinkRecipe, Source], Reduction]] = {
    "heads": heads.plan,
    "ffn": ffn.plan,
    "experts": experts.plan,
    "blocks": blocks.plan,
}


def plan_reductions(recipe: ShrinkRecipe, source: Source) -> list[Reduction]:
    """Those that a recipe asks for. RecipeError or CheckpointError for what cannot be."""
    return [plan(recipe, source) for name, plan in ORDER.items() if name in recipe.amounts]
