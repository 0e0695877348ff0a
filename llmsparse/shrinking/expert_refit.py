"""The last projection of every expert that stays, fitted so that together they come closest to what all of them gave.

argmin_W̃ Σ ‖y − Σ_j g_j W̃_j h_j‖², where y is what all experts gave, g and h the gates and hidden units of the smaller
mixture on the same tokens. One expert after the other takes what the others leave, r + g W h, with r = y − Σ_j g_j W_j h_j
(block coordinate descent: the error never rises on what is fitted). Tokens of one batch in eight are not fitted on: they
choose how strongly each W̃ is held to W, and judge whether all of it helps.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.calibration.least_squares import JUDGES, fit
from llmsparse.calibration.matching import HELD_OUT_SHARE
from llmsparse.models.streamed import Activations, Block, Weight
from llmsparse.models.tap import Tap
from llmsparse.scoring.mixture import Call, Mixture, intercepted
from llmsparse.sparsity.patterns import is_sparse

LEAST_GAIN = 0.01  # of the error: less is not worth rounding weights anew
NOISE = 1e-6  # an error that is nothing but rounding, in float32


class Sent(NamedTuple):
    """Tokens of one batch that are sent to one expert."""

    batch: int
    tokens: Tensor  # (some,)
    h: Tensor  # (some, in) g h: what enters its last projection, times the gate; float32


def refit_experts(made: Block, acts: Activations, mixture: Mixture, targets: list[Tensor]) -> dict[str, Any]:
    """Fit last projections in `made.stored` where that helps; returns what is to be said of it.

    `mixture` is that of the made block; `targets` are (tokens, width) of every batch, what all experts gave, and are let go
    of. An expert that is sparse already is left as it is: a fit would fill its zeros.
    """
    judges = range(0, len(targets), HELD_OUT_SHARE)
    if len(targets) == len(judges):
        targets.clear()
        return {"kept": False, "why": "one batch of calibration: none to judge by"}
    rounding = 4 * torch.finfo(targets[0].dtype).eps ** 2
    energy = sum(targets[batch].float().square().sum().item() for batch in judges)
    calls = experts_called(made, acts, mixture)
    left = [targets.pop(0).float() - call.observe().output.float() for call in calls]  # (tokens, width) each: r

    def error() -> float:
        """Σ ‖r‖² over Σ ‖y‖² of the tokens that judge."""
        return sum(left[batch].square().sum().item() for batch in judges) / max(energy, 1e-300)

    before = error()
    said = {"kept": False, "error_before": before, "error_after": before}
    if before <= max(NOISE, rounding):
        return said
    weights = last_projections(made, mixture)
    kept = {weight.key: made.stored[weight.key] for weight in weights}
    made.stored.update({key: tensor.clone() for key, tensor in kept.items()})
    try:
        changed = [weight.slot[1] for weight in weights if refit_expert(made, weight, mixture, calls, left)]
    except Unseen:
        made.stored.update(kept)
        return said | {"why": "hidden units of experts are not seen one for each token"}
    after = error()
    if after < (1 - LEAST_GAIN) * before:
        made.reload()
        return {"kept": True, "error_before": before, "error_after": after, "experts": changed}
    made.stored.update(kept)
    return said | {"error_after": after}


def refit_expert(made: Block, weight: Weight, mixture: Mixture, calls: Sequence[Call], left: list[Tensor]) -> bool:
    """Fit the last projection of one expert to what it gives and what is `left`, and take from `left` what it then gives;
    False where it stays as it is."""
    start = made.view(weight).to(left[0].device, torch.float32, copy=True)  # (width, in)
    if is_sparse(start):
        return False
    size = start.shape[1]
    gram, along = start.new_zeros(size, size), start.new_zeros(size, len(start))  # Σ g²hhᵀ, Σ g h yᵀ
    judges: list[tuple[Tensor, Tensor]] = []
    for batch, tokens, h in hidden_units(made, weight, mixture, calls):
        y = left[batch][tokens] + h @ start.T  # (some, width)
        if batch % HELD_OUT_SHARE:
            gram.addmm_(h.T, h)
            along.addmm_(h.T, y)
        elif sum(len(h) for h, _ in judges) < JUDGES:
            judges.append((h, y))
    fitted = fit(gram, along, start, judges)
    if fitted.damp is None:
        return False
    made.store(weight, fitted.weight)
    change = made.view(weight).to(start) - start
    for batch, tokens, h in hidden_units(made, weight, mixture, calls):
        left[batch][tokens] -= h @ change.T
    return True


def last_projections(made: Block, mixture: Mixture) -> list[Weight]:
    """One of each expert, in their order."""
    found = [weight for weight in made.weights if weight.slot[0] == mixture.down]
    return sorted(found, key=lambda weight: weight.slot[1] or 0)


def hidden_units(made: Block, weight: Weight, mixture: Mixture, calls: Sequence[Call]) -> Iterator[Sent]:
    """What enters the last projection of one expert, batch by batch."""
    expert = weight.slot[1] or 0
    for batch, call in enumerate(calls):
        if not bool((call.index == expert).any()):
            continue
        seen: list[Tensor] = []

        def note(slot: tuple[str, int | None], x: Tensor, seen: list[Tensor] = seen) -> None:
            if slot == weight.slot:
                seen.append(x.float())

        with Tap(made, note):
            tokens, weights, _ = call.alone(expert)
        h = torch.cat(seen)
        if len(h) != len(tokens):
            raise Unseen
        yield Sent(batch, tokens, h * weights.float()[:, None])


class Unseen(Exception):
    """An expert multiplies its last projection with something else than one vector a token."""


class _Called(Exception):
    """How the experts are called is known; the rest of the block need not run."""


def experts_called(made: Block, acts: Activations, mixture: Mixture) -> list[Call]:
    """The call of the block's experts on every batch."""
    calls: list[Call] = []

    def keep(call: Call) -> Tensor:
        calls.append(call)
        raise _Called

    for batch in range(len(acts.hidden)):
        with suppress(_Called), intercepted(made, mixture, keep):
            made.call(acts, batch)
    return calls
