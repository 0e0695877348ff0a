"""The verbs that run a recipe, and where the parts of each are. Everything that lists verbs reads this table.

A part is named as `module:name` and loaded when it is asked for: the table itself loads nothing, so `--help` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from llmsparse.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from llmsparse.runs.keys import Key
    from llmsparse.runs.plan import RunPlan
    from llmsparse.runs.recipe import RunRecipe
    from llmsparse.runs.report import RunReport


class Verb(NamedTuple):
    """A verb. What it brings is described in docs/architecture.md."""

    describes: str  # module with HELP, EXAMPLE and KEYS: what the command line shows
    recipe: str  # a RunRecipe
    make_plan: str  # (recipe, *, resume, overwrite, download) → RunPlan
    run: str  # (recipe, *, resume, overwrite, progress) → RunReport
    shipped: str = ""  # folder of its shipped recipes, inside `recipes/`

    @property
    def help(self) -> str:
        return _part(f"{self.describes}:HELP")

    @property
    def example(self) -> str:
        """Of an assignment `key=value`."""
        return _part(f"{self.describes}:EXAMPLE")

    @property
    def keys(self) -> Mapping[str, Mapping[str, Key]]:
        """Of its recipe, by the panel that `--help` shows them in."""
        return _part(f"{self.describes}:KEYS")

    def load_recipe(self) -> type[RunRecipe]:
        return _part(self.recipe)

    def load_make_plan(self) -> Callable[..., RunPlan[Any]]:
        return _part(self.make_plan)

    def load_run(self) -> Callable[..., RunReport]:
        return _part(self.run)


VERBS: dict[str, Verb] = {
    "prune": Verb(
        "llmsparse.pruning.keys",
        "llmsparse.pruning.recipe:PruneRecipe",
        "llmsparse.pruning.plan:make_plan",
        "llmsparse.pruning.pipeline:prune",
    ),
    "factorize": Verb(
        "llmsparse.factorization.keys",
        "llmsparse.factorization.recipe:FactorizeRecipe",
        "llmsparse.factorization.plan:make_plan",
        "llmsparse.factorization.pipeline:factorize",
        shipped="factorize",
    ),
    "quantize": Verb(
        "llmsparse.quantization.keys",
        "llmsparse.quantization.recipe:QuantizeRecipe",
        "llmsparse.quantization.plan:make_plan",
        "llmsparse.quantization.pipeline:quantize",
        shipped="quantize",
    ),
    "shrink": Verb(
        "llmsparse.shrinking.keys",
        "llmsparse.shrinking.recipe:ShrinkRecipe",
        "llmsparse.shrinking.plan:make_plan",
        "llmsparse.shrinking.pipeline:shrink",
        shipped="shrink",
    ),
    "activations": Verb(
        "llmsparse.cutting.keys",
        "llmsparse.cutting.recipe:ActivationsRecipe",
        "llmsparse.cutting.plan:make_plan",
        "llmsparse.cutting.pipeline:activations",
        shipped="activations",
    ),
    "scores": Verb(
        "llmsparse.scoring.keys",
        "llmsparse.scoring.recipe:ScoresRecipe",
        "llmsparse.scoring.plan:make_plan",
        "llmsparse.scoring.pipeline:scores",
        shipped="scores",
    ),
    "tune": Verb(
        "llmsparse.tuning.keys",
        "llmsparse.tuning.recipe:TuneRecipe",
        "llmsparse.tuning.plan:make_plan",
        "llmsparse.tuning.pipeline:tune",
        shipped="tune",
    ),
}


def verb_of(recipe: RunRecipe) -> Verb:
    """The verb that runs a recipe. RecipeError for one that no verb of the table runs."""
    for verb in VERBS.values():
        if type(recipe) is verb.load_recipe():
            return verb
    raise RecipeError(f"{type(recipe).__name__}: no verb runs such a recipe; known are {', '.join(VERBS)}")


def _part(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
