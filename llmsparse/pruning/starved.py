"""Weights that calibration hardly reached: an expert of a mixture sees only the tokens that are sent to it.

From a handful of tokens a method does worse than one that looks at less: below 32 Wanda is worse than magnitude, up to
four times, and a Hessian of fewer tokens than inputs, solved by SparseGPT or ALPS, is worse than Wanda. So such a weight
falls back, and the report says so.
"""

from __future__ import annotations

from llmsparse.calibration.inputs import Input
from llmsparse.errors import LlmsparseError
from llmsparse.pruners import Magnitude, Pruner, Wanda
from llmsparse.pruning.selection import Choice


def pruner_that_fits(choice: Choice, entry: Input, tokens: int) -> tuple[Pruner, str | None]:
    """The method of a choice, or the one that it falls back to, and why; `tokens` are those of the whole calibration.

    LlmsparseError for a weight that no token reached and that is no expert.
    """
    weight, pruner, seen = choice.weight, choice.pruner, entry.tokens
    if seen == 0 and weight.expert is None and weight.kind != "expert":
        raise LlmsparseError(f"no calibration token reached {weight.name}; leave it out with --exclude {weight.name!r}")
    needs = pruner.needs
    wanted = needs.least_tokens(entry.width) if needs else 0
    if seen >= wanted or seen == tokens:  # a text as short as that is the user's choice; the report warns
        return pruner, None
    instead = Wanda()
    if seen < instead.needs.least_tokens(entry.width):
        return Magnitude(), f"magnitude: {_reached(seen)}, {choice.method} wants {wanted}"
    return instead, f"wanda: {_reached(seen)}, {choice.method} wants {wanted}"


def _reached(seen: int) -> str:
    count = {0: "no calibration token", 1: "1 calibration token"}.get(seen, f"{seen} calibration tokens")
    return f"{count} reached it"
