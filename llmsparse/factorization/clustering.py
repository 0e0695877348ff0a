"""Balanced k-means: clusters of given sizes, for as many neurons as a large FFN has.

The assignment step is a transport problem. Its prices come from Sinkhorn's iteration (Cuturi, 2013), which costs
O(points · clusters) a step; points then go to the cheapest cluster at these prices that has room, those that would
lose most by going elsewhere first. An exact assignment takes the square of the points in memory and more in time.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ITERATIONS = 12
TEMPERATURES = (0.3, 0.1, 0.03, 0.01)  # of the mean spread of a point's costs; prices are warm-started down the list
STEPS = 25  # of Sinkhorn at each temperature


def balanced_kmeans(
    points: Tensor, sizes: Sequence[int], generator: torch.Generator, iterations: int = ITERATIONS
) -> Tensor:
    """Cluster of each point, (points,) int64 on the CPU, with exactly `sizes[j]` points in cluster j.

    `points` is (points, features), any float dtype; `generator` is on the CPU. ValueError if the sizes do not add up.
    """
    if sum(sizes) != len(points):
        raise ValueError(f"{len(points)} points cannot fill clusters of {sum(sizes)}")
    points = points.float()
    centres = points[spread_out(points, len(sizes), generator)]  # (clusters, features)
    labels = torch.empty(0, dtype=torch.int64)
    for _ in range(iterations):
        new = assign(torch.cdist(points, centres).square(), sizes)
        if torch.equal(new, labels):
            break
        labels = new
        member = torch.nn.functional.one_hot(labels, len(sizes)).to(points)  # (points, clusters)
        centres = member.T @ points / member.sum(0)[:, None]
    return labels


def spread_out(points: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """`count` points drawn one after the other, each by its squared distance to the nearest so far (k-means++)."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = torch.full((len(points),), torch.inf, device=points.device)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(-1))
        weights = nearest.double().cpu()
        weights[chosen] = 0
        if weights.sum() <= 0:  # fewer distinct points than clusters
            weights = torch.ones(len(points), dtype=torch.float64)
            weights[chosen] = 0
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return chosen


def assign(cost: Tensor, sizes: Sequence[int]) -> Tensor:
    """The cluster of each point, (points,) int64 on the CPU, filling `sizes` at close to the least total cost.

    `cost` is (points, clusters).
    """
    cost = cost.double().cpu()
    at_prices = cost - prices(cost, sizes)
    room = torch.tensor(sizes)
    labels = torch.full((len(cost),), -1)
    waiting = torch.arange(len(cost))
    while len(waiting):
        open_cost = at_prices[waiting].masked_fill(room == 0, torch.inf)
        best = open_cost.topk(min(2, len(sizes)), largest=False)
        regret = best.values[:, -1] - best.values[:, 0]  # what the second choice would cost; inf where there is none
        wanted = best.indices[:, 0]
        for cluster in wanted.unique().tolist():
            bidders = (wanted == cluster).nonzero()[:, 0]
            ranked = bidders[regret[bidders].argsort(descending=True, stable=True)][: int(room[cluster])]
            labels[waiting[ranked]] = cluster
            room[cluster] -= len(ranked)
        waiting = waiting[labels[waiting] < 0]
    return labels


def prices(cost: Tensor, sizes: Sequence[int]) -> Tensor:
    """What to take off the cost of each cluster, (clusters,), so that demand meets `sizes`: a dual of the transport."""
    spread = float((cost.mean(1, keepdim=True) - cost).abs().mean())
    price = torch.zeros(len(sizes), dtype=cost.dtype)
    if spread == 0:
        return price
    share = torch.tensor(sizes, dtype=cost.dtype).log()
    for temperature in TEMPERATURES:
        scale = temperature * spread
        for _ in range(STEPS):
            demand = ((price - cost) / scale).log_softmax(1).logsumexp(0)  # log of the points each cluster would get
            price = price + scale * (share - demand)
    return price
