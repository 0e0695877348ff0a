"""heads"""

from __future__ import annotations

from llmsparse.errors import RecipeError
from llmsparse.shrinking.recipe import ShrinkRecipe
from llmsparse.shrinking.reduction import Reduction, Source


def plan(recipe: ShrinkRecipe, source: Source) -> Reduction:
    raise RecipeError("--heads: not yet")
