"""A plan that the processes of a run make together: each its own, all the same.

What one of them finds wrong ends all of them, and so does a process that would do something else than the first: another
recipe, model, text, version, number of threads or device.
"""

from __future__ import annotations

import json
from typing import Any, Protocol, TypeVar

from llmsparse.errors import RecipeError
from llmsparse.ranks.group import Ranks
from llmsparse.ranks.launch import joined
from llmsparse.runs.differences import spell_differences
from llmsparse.runs.plan import RunPlan

Asked = TypeVar("Asked", contravariant=True)
Planned = TypeVar("Planned", bound=RunPlan[Any], covariant=True)


class MakesPlan(Protocol[Asked, Planned]):
    """What a verb's `make_plan` is."""

    def __call__(
        self, recipe: Asked, *, resume: bool = False, overwrite: bool = False, download: bool = True
    ) -> Planned: ...


def joint(make_plan: MakesPlan[Asked, Planned]) -> MakesPlan[Asked, Planned]:
    """`make_plan` of a verb that several processes can run together."""

    def make(recipe: Asked, *, resume: bool = False, overwrite: bool = False, download: bool = True) -> Planned:
        ranks = joined()
        with ranks.together():
            plan = make_plan(recipe, resume=resume, overwrite=overwrite, download=download)
        refuse_others(ranks, {**plan.fingerprint, "output": str(plan.output)})
        return plan

    make.__doc__ = make_plan.__doc__
    return make


def refuse_others(ranks: Ranks, fingerprint: dict[str, Any]) -> None:
    """RecipeError for a process whose fingerprint, JSON-able, is not that of the first."""
    mine: dict[str, Any] = json.loads(json.dumps(fingerprint))
    first = ranks.broadcast(mine, 0)
    with ranks.together():
        if differing := spell_differences(first, mine, ("on rank 0", "here")):
            raise RecipeError(f"differs from rank 0 in {differing}; give all nodes the same recipe, files and versions")
