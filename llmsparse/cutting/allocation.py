"""Which share of its inputs each layer of a block leaves out, so that the block as a whole leaves out a given one.

Greedy, as TEAL has it (arXiv 2408.14690, algorithm 1): from nothing on, the layer goes a step further whose step adds least
to the block's error for the weights that it spares, until the total is reached. An error is measured again only where the
step that looked best may no longer be (Minoux 1978): of an early step little is known that later ones change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

STEP = 0.05  # of a layer's inputs
MOST = 0.95  # of them that a layer may leave out

Levels = dict[str, float]  # layer → share of its inputs left out


def uniform(sizes: Mapping[str, int], share: float) -> Levels:
    """`sizes`: layer → number of its weights."""
    return dict.fromkeys(sizes, share)


def greedy(sizes: Mapping[str, int], share: float, error: Callable[[Levels], float]) -> Levels:
    """Levels whose mean, weighed by `sizes`, is `share`; `error` measures the block with some levels."""
    levels, left = dict.fromkeys(sizes, 0.0), share * sum(sizes.values())
    most = max(MOST, share)
    now = 0.0
    known: dict[
        str, tuple[float, float, int]
    ] = {}  # layer → error added a weight, error with the step, steps taken when found
    taken = 0
    while left > 1e-9 * sum(sizes.values()):
        steps = {name: min(STEP, most - levels[name], left / sizes[name]) for name in sizes}
        open_to = [name for name in sizes if steps[name] > 1e-12]
        while True:
            stale = [name for name in open_to if name not in known]
            best = stale[0] if stale else min(open_to, key=lambda name: known[name][0])
            if not stale and known[best][2] == taken:
                break
            found = error(levels | {best: levels[best] + steps[best]})
            known[best] = ((found - now) / (steps[best] * sizes[best]), found, taken)
        levels[best] += steps[best]
        left -= steps[best] * sizes[best]
        now = known.pop(best)[1]
        taken += 1
    return levels
