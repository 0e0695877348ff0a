"""Rules of a recipe: other settings for the weights whose on-disk name (without `.weight`) matches a glob.

The last rule that matches a weight counts, alone: what it leaves out comes from the recipe's own keys, never from an earlier
rule that matches too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

from llmsparse.errors import RecipeError, did_you_mean


class Matching(Protocol):
    """A rule of any verb."""

    match: str


Found = TypeVar("Found", bound=Matching)


def rule_for(rules: Sequence[Found], name: str) -> Found | None:
    """The rule that counts for a weight."""
    return next((rule for rule in reversed(rules) if fnmatchcase(name, rule.match)), None)


def check_rules(rules: Sequence[Matching], names: Iterable[str]) -> None:
    """RecipeError for a rule whose glob matches none of the weights `names`."""
    known = list(names)
    for index, rule in enumerate(rules):
        if not any(fnmatchcase(name, rule.match) for name in known):
            hint = did_you_mean(rule.match, known).partition(" known:")[0].rstrip(";")
            example = "" if hint or not known else f"; a name looks like {known[0]!r}"
            raise RecipeError(
                f"rules[{index}]: match {rule.match!r} matches none of {len(known)} weights{hint or example}"
            )
