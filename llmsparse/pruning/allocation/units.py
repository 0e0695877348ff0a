"""Which weights share one sparsity, and the pattern that each gets of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from llmsparse.errors import RecipeError
from llmsparse.models.streamed import HEAD
from llmsparse.pruning.allocation.exact import bounded, in_steps, to_levels
from llmsparse.pruning.allocation.protocol import Unit
from llmsparse.pruning.selection import Choice
from llmsparse.sparsity.patterns import NofM, Pattern, Unstructured

Level = Literal["block", "projection", "weight"]
EXPERT = re.compile(r"\.\d+(?=\.)")  # its number, in the name of a weight


@dataclass(frozen=True)
class Group:
    """A unit and the choices whose weights it is made of."""

    unit: Unit
    block: str
    choices: tuple[Choice, ...]


def groups_of(choices: Mapping[str, Sequence[Choice]], level: Level) -> list[Group]:
    """The choices of all blocks, block name → choices, by what shares one sparsity; the output head is none of them, nor is
    what a rule gives a sparsity or pattern of its own (`Choice.ruled`)."""
    found: dict[tuple[str, str], list[Choice]] = {}
    for block, members in choices.items():
        for choice in members:
            if block != HEAD and not choice.ruled:
                found.setdefault((block, _name(block, choice, level)), []).append(choice)
    return [
        Group(Unit(name, tuple(one.weight.shape for one in members)), block, tuple(members))
        for (block, name), members in found.items()
    ]


def _name(block: str, choice: Choice, level: Level) -> str:
    if level == "weight":
        return choice.weight.name
    projection = EXPERT.sub(".*", choice.weight.slot[0]).removesuffix(".weight")
    return block if level == "block" else f"{block}.{projection}"


def settle(
    wished: Sequence[float],
    groups: Sequence[Group],
    sparsity: float,
    bounds: tuple[float, float],
    levels: Sequence[Pattern],
) -> dict[str, Pattern]:
    """Weight name → pattern: near what was wished for each group, `sparsity` in all, within `bounds`.

    `levels` are the patterns that there are, densest first, where these are few (N:M); else any number of zeros will do.
    """
    sizes = [group.unit.numel for group in groups]
    if levels:
        numbers = to_levels(wished, sizes, [pattern.sparsity for pattern in levels], sparsity)
        by_sparsity = {pattern.sparsity: pattern for pattern in levels}
        return {
            choice.weight.name: by_sparsity[number]
            for group, number in zip(groups, numbers, strict=True)
            for choice in group.choices
        }
    possible = bounded(wished, sizes, sparsity, *bounds)
    choices = [(choice, value) for group, value in zip(groups, possible, strict=True) for choice in group.choices]
    patterns = [choice.pattern for choice, _ in choices]
    numels = [prod(choice.weight.shape) for choice, _ in choices]
    steps = [
        choice.weight.shape[0] if isinstance(pattern, Unstructured) and pattern.scope == "row" else 1
        for (choice, _), pattern in zip(choices, patterns, strict=True)
    ]
    zeros = sum(
        step * round(pattern.sparsity * (numel // step))
        for step, pattern, numel in zip(steps, patterns, numels, strict=True)
    )
    counts = in_steps([value for _, value in choices], numels, steps, zeros)
    return {
        choice.weight.name: replace(pattern, sparsity=count / numel) if isinstance(pattern, Unstructured) else pattern
        for (choice, _), pattern, count, numel in zip(choices, patterns, counts, numels, strict=True)
    }


def levels_of(pattern: Pattern, sparsity: float | None) -> list[Pattern]:
    """The patterns that units of an N:M model get, densest first: dense beside N:M where a `sparsity` says how much of
    it, else any N of the same M. None where the pattern is unstructured."""
    if not isinstance(pattern, NofM):
        return []
    dense = Unstructured(0.0, "matrix")
    if sparsity is not None:
        return [dense, pattern]
    return [dense, *(NofM(n, pattern.m) for n in range(pattern.m - 1, 0, -1))]


def refuse_bounds(sparsity: float, bounds: tuple[float, float]) -> None:
    """RecipeError where no total of `sparsity` can be made of what lies within the bounds."""
    low, high = bounds
    if not low <= sparsity <= high:
        raise RecipeError(
            f"--allocation-bounds {low:g},{high:g}: a sparsity of {sparsity:g} overall cannot be reached within them; "
            "give bounds on both sides of it"
        )
