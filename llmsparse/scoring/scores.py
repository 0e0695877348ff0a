"""Which experts stay: a score for each, or the set whose loss adds up to least.

    frequency   tokens sent to the expert
    mass        Σ g
    reap        mean of g‖f‖ over the tokens sent to it (arXiv 2510.13999)
    man         mean of ‖f‖ over these (arXiv 2606.15716)
    hope        the least pᵀFp of the experts taken out (hope.py)
    random      drawn by the seed, to compare with

Of experts that no token reached nothing is known but that nobody misses them: they go first, the smallest weights before
the others. An expert that gives far larger outputs than its neighbours may be one that the model cannot do without
("super experts", arXiv 2507.23279): it stays. Neither holds for `random`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.scoring.hope import least_loss
from llmsparse.scoring.statistics import ExpertStatistics

SUPER = 10.0  # times the median of the largest outputs of a block's experts

SCORES: dict[str, Callable[[ExpertStatistics], Tensor]] = {  # (E,), the larger the more important
    "frequency": lambda statistics: statistics.tokens,
    "mass": lambda statistics: statistics.gates,
    "reap": lambda statistics: statistics.additions / statistics.tokens.clamp_min(1e-300),
    "man": lambda statistics: statistics.outputs / statistics.tokens.clamp_min(1e-300),
}


@dataclass(frozen=True)
class Chosen:
    """Which experts of a block stay, and why."""

    kept: list[int]
    unreached: list[int]  # by no token of the text
    super_experts: list[int]  # kept whatever their score
    lost: float | None  # pᵀFp of those taken out over that of all; None where nothing was measured


def choose(
    statistics: ExpertStatistics,
    score: str,
    keep: int,
    *,
    groups: int = 1,
    sizes: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Chosen:
    """`keep` of the experts, as many in each of `groups` equal parts in a row; `sizes` (E,) are norms of their weights."""
    experts, goes = statistics.experts, (statistics.experts - keep) // groups
    spans = torch.arange(experts).reshape(groups, -1).tolist()
    if score == "random":
        gone = {
            span[place] for span in spans for place in torch.randperm(len(span), generator=generator)[:goes].tolist()
        }
        return Chosen([expert for expert in range(experts) if expert not in gone], [], [], _lost(statistics, gone))

    unreached = (statistics.tokens == 0).nonzero()[:, 0].tolist()
    protected = super_experts(statistics)
    sizes = torch.zeros(experts) if sizes is None else sizes
    gone: set[int] = set()
    left: list[tuple[list[int], int]] = []  # what is still to be chosen among, and how many of it go
    for span in spans:
        idle = sorted(
            (expert for expert in span if expert in unreached), key=lambda expert: (float(sizes[expert]), expert)
        )
        gone |= set(idle[:goes])
        free = [expert for expert in span if expert not in unreached and expert not in protected]
        tight = [expert for expert in span if expert in protected]  # go only where nothing else is left
        count = goes - len(idle[:goes])
        spare = max(0, count - len(free))
        gone |= set(sorted(tight, key=lambda expert: float(statistics.peak[expert]))[:spare])
        left.append((free, count - spare))
    if score == "hope":
        gone |= set(least_loss(statistics.pairs, left))
    else:
        value = SCORES[score](statistics)
        for free, count in left:
            gone |= set(sorted(free, key=lambda expert: (float(value[expert]), expert))[:count])
    kept = [expert for expert in range(experts) if expert not in gone]
    return Chosen(kept, unreached, [expert for expert in protected if expert in kept], _lost(statistics, gone))


def super_experts(statistics: ExpertStatistics) -> list[int]:
    """Experts whose largest output is far beyond what the block's experts give in general."""
    reached = statistics.peak[statistics.tokens > 0]
    if len(reached) < 2:
        return []
    return (statistics.peak > SUPER * reached.median()).nonzero()[:, 0].tolist()


def _lost(statistics: ExpertStatistics, gone: set[int]) -> float | None:
    total = float(statistics.pairs.sum())
    out = torch.tensor(sorted(gone))
    return float(statistics.pairs[out][:, out].sum()) / total if total > 0 else None
