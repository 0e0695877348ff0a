"""How long a pruning takes on a CPU, counted in operations; on a GPU matching is always affordable and nothing is estimated."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from llmsparse.calibration.matching import LEARNING_RATES, batches_per_step, probe_steps
from llmsparse.models.streamed import HEAD
from llmsparse.pruning.allocation.survey import LOOKED_TOKENS
from llmsparse.pruning.effort import EFFORTS, EffortName
from llmsparse.ranks.tree import leaves_at, leaves_of
from llmsparse.sparsity.stats import Gram

if TYPE_CHECKING:
    from llmsparse.pruning.plan import PrunePlan

FLOPS_PER_THREAD = 30e9  # fp32 with gradients on one core; AVX2 measured at 34e9
PASSES = 2  # over the calibration windows: to measure inputs, and behind what was made
SWEEPS = {"alps": 60}  # products of (out, in, in) that a method takes, where it is not half of one, right of a diagonal


def default_match_steps(plan: PrunePlan) -> int:
    """Matching is on wherever it stays affordable: fully on any GPU, and on a CPU as far as the effort's seconds allow."""
    effort = EFFORTS[plan.recipe.effort]
    if plan.device.type == "cuda":
        return max(effort.match_steps, default=0)
    affordable = (steps for steps in effort.match_steps if matching_seconds(plan, steps) <= effort.seconds)
    return next(affordable, 0)


def matching_seconds(plan: PrunePlan, steps: int) -> float:
    """By one process, so that steps are chosen alike for any number of them. For each token and step 2 operations forward and
    4 backward for each parameter and for each product of attention, and
    of the head behind the last block four products: for the aim, forward, once more for the gradient, and that."""
    width, (windows, tokens), most = plan.model.hidden_size, plan.batches[0].shape, len(plan.batches)
    products = 6 * _products(plan) + 8 * plan.model.vocabulary * width
    per_step = products * batches_per_step(windows, tokens, width, most=most) * windows * tokens
    total = steps + probe_steps(steps) * len(LEARNING_RATES) if steps else 0
    return total * per_step / _speed(plan)


def seconds_of(plan: PrunePlan) -> float:
    """The whole run: passes over the text, Gram matrices, what methods solve, and matching; of several processes until the
    last is done with its share."""
    share, held = _share(plan, len(plan.batches)), _share(plan, len(plan.held_out))
    tokens, seen = share * plan.windows.ids.numel(), held * 2 * plan.windows.held_out.numel()
    passes = PASSES + (plan.match_steps > 0) + bool(plan.folds)
    looked = share * min(plan.windows.ids.numel(), LOOKED_TOKENS) if plan.allocates else 0
    forward = 2 * _products(plan) * (passes * tokens + looked + seen)
    forward += 2 * plan.model.hidden_size * plan.model.vocabulary * seen
    grams = solving = 0.0
    for members in plan.choices.values():
        inputs = dict[tuple[str, int], float]()  # module, width → what its weights take to solve
        for choice in members:
            out, width = choice.weight.shape
            if choice.pruner.needs is Gram:
                solves = 2 if plan.fading else 1  # most of the zeros first, where the rest fades
                place = choice.weight.name.rpartition(".")[0], width
                inputs.setdefault(place, width**3 / 3)  # Cholesky's
                inputs[place] += 2 * out * width**2 * SWEEPS.get(choice.method, 0.5) * solves
        grams += sum(tokens * width**2 for _, width in inputs)  # right of the diagonal
        solving += _longest(plan, list(inputs.values()))
    return (forward + grams + solving) / _speed(plan) + _step_share(plan) * matching_seconds(plan, plan.match_steps)


def _share(plan: PrunePlan, batches: int) -> float:
    """Of so many batches, those of the process that has most."""
    leaves = leaves_of(batches)
    of_each = (leaves_at(rank, plan.ranks.size, len(leaves)) for rank in range(plan.ranks.size))
    return max(sum(len(leaves[leaf]) for leaf in mine) for mine in of_each) / max(1, batches)


def _step_share(plan: PrunePlan) -> float:
    """Of the batches of a step of matching, which lie far apart, those of the process that has most."""
    windows, tokens = plan.batches[0].shape
    batches = batches_per_step(windows, tokens, plan.model.hidden_size, most=len(plan.batches))
    return -(-batches // plan.ranks.size) / batches


def _longest(plan: PrunePlan, costs: list[float]) -> float:
    """What the process with most to solve has of these."""
    load = [0.0] * plan.ranks.size
    for cost, owner in zip(costs, plan.ranks.assigned(costs), strict=True):
        load[owner] += cost
    return max(load)


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


def _speed(plan: PrunePlan) -> float:
    return FLOPS_PER_THREAD * plan.threads
