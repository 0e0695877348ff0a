"""The step at which a weight takes the bits that it may: a few trials, since a bit less is a step twice as large."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Found = TypeVar("Found")

TOLERANCE = 0.004  # bits a weight, beside those asked for
TRIALS = 6
SLOPE = (-1.6, -0.4)  # bits for log2 of the step, in which range it is believed


@dataclass(frozen=True)
class Trial(Generic[Found]):
    """What a step gave."""

    step: float  # in root mean squares of a row
    bits: float  # a weight
    made: Found


def step_for(
    bits: float, attempt: Callable[[float], tuple[float, Found]], start: float, *, least: float, most: float
) -> Trial[Found]:
    """The trial nearest to `bits` that a secant over log2 of the step finds from `start`; between `least` and `most`."""
    trials: list[Trial[Found]] = []
    step, slope = min(max(start, least), most), -1.0
    for _ in range(TRIALS):
        trials.append(Trial(step, *attempt(step)))
        best = min(trials, key=lambda trial: abs(trial.bits - bits))
        if abs(best.bits - bits) <= TOLERANCE:
            break
        if len(trials) > 1 and trials[-1].step != trials[-2].step:
            run = math.log2(trials[-1].step / trials[-2].step)
            slope = min(max((trials[-1].bits - trials[-2].bits) / run, SLOPE[0]), SLOPE[1])
        following = min(max(best.step * 2 ** ((bits - best.bits) / slope), least), most)
        if any(math.isclose(following, trial.step, rel_tol=1e-6) for trial in trials):
            break
        step = following
    return min(trials, key=lambda trial: abs(trial.bits - bits))
