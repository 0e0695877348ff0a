"""How long a pruning takes on a CPU, counted in operations; on a GPU matching is always affordable and nothing is estimated."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from llmsparse.calibration.matching import LEARNING_RATES, batches_per_step, probe_steps
from llmsparse.models.streamed import HEAD
from llmsparse.pruning.effort import EFFORTS, EffortName
from llmsparse.sparsity.stats import Gram

if TYPE_CHECKING:
    from llmsparse.pruning.plan import PrunePlan

FLOPS_PER_THREAD = 30e9  # fp32 with gradients on one core; AVX2 measured at 34e9
PASSES = 2  # over the calibration windows: to measure inputs, and behind what was made
SWEEPS = {"alps": 60}  # products of (out, in, in) that a method takes, where it is not about one


def default_match_steps(plan: PrunePlan) -> int:
    """Matching is on wherever it stays affordable: fully on any GPU, and on a CPU as far as the effort's seconds allow."""
    effort = EFFORTS[plan.recipe.effort]
    if plan.device.type == "cuda":
        return max(effort.match_steps, default=0)
    affordable = (steps for steps in effort.match_steps if matching_seconds(plan, steps) <= effort.seconds)
    return next(affordable, 0)


def matching_seconds(plan: PrunePlan, steps: int) -> float:
    """For each token and step 2 operations forward and 4 backward for each parameter and for each product of attention, and
    of the head behind the last block four products: for the aim, forward, once more for the gradient, and that."""
    width, (windows, tokens), most = plan.model.hidden_size, plan.batches[0].shape, len(plan.batches)
    products = 6 * _products(plan) + 8 * plan.model.vocabulary * width
    per_step = products * batches_per_step(windows, tokens, width, most=most) * windows * tokens
    total = steps + probe_steps(steps) * len(LEARNING_RATES) if steps else 0
    return total * per_step / _speed()


def seconds_of(plan: PrunePlan) -> float:
    """The whole run: passes over the text, Gram matrices, what methods solve, and matching."""
    tokens, seen = plan.windows.ids.numel(), 2 * plan.windows.held_out.numel()
    passes = PASSES + (plan.match_steps > 0) + plan.allocates + bool(plan.folds)
    forward = 2 * _products(plan) * (passes * tokens + seen)
    forward += 2 * plan.model.hidden_size * plan.model.vocabulary * seen
    solving, inputs = 0.0, set[tuple[str, int]]()
    for choice in (choice for members in plan.choices.values() for choice in members):
        out, width = choice.weight.shape
        if choice.pruner.needs is Gram:
            inputs.add((choice.weight.name.rpartition(".")[0], width))
            solves = 2 if plan.fading else 1  # most of the zeros first, where the rest fades
            solving += 2 * out * width**2 * SWEEPS.get(choice.method, 1) * solves
    grams = sum(2 * tokens * width**2 + 2 * width**3 for _, width in inputs)
    return (forward + grams + solving) / _speed() + matching_seconds(plan, plan.match_steps)


def seconds_by_effort(plan: PrunePlan) -> dict[EffortName, float]:
    """Effort → estimated seconds of this run by it; nothing on a GPU."""
    if plan.device.type == "cuda":
        return {}
    found: dict[EffortName, float] = {}
    for name in EFFORTS:
        draft = replace(plan, recipe=plan.recipe.replace(effort=name))
        steps = default_match_steps(draft) if plan.recipe.match_steps == "auto" else plan.match_steps
        found[name] = seconds_of(replace(draft, match_steps=steps))
    return found


def spell_seconds(seconds: dict[EffortName, float]) -> str:
    return "about " + ", ".join(f"{math.ceil(spent):,} s by effort {name}" for name, spent in seconds.items())


def _products(plan: PrunePlan) -> int:
    """Multiplications for one token: of every weight that is pruned, and of attention."""
    pruned = (key for key in plan.selected_keys if key not in {choice.weight.key for choice in plan.choices[HEAD]})
    parameters = sum(torch.Size(plan.tensors[key][0]).numel() for key in pruned)
    return parameters + 2 * len(plan.model.block_names) * plan.batches[0].shape[1] * plan.model.hidden_size


def _speed() -> float:
    return FLOPS_PER_THREAD * torch.get_num_threads()
