"""Which routed experts run for a token: a linear score for each, the `active` highest run.

A `Router` computes what the container's own does (`sigmoid`: Glm4Moe, which adds a bias for the choice alone; `softmax`:
Mixtral, Qwen2Moe, Qwen3Moe), from the weights as they are stored. Experts that run should add their output as it is, so
the scores are scaled down until their weights after normalisation are 1/active to within a thousandth, which leaves
their order alone; `active` itself is folded into the experts.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.split import Split

Formula = Literal["sigmoid", "softmax"]

SPREAD = 2.0**-11  # of the scores that are stored: weights then stay within 0.1 % of 1/active
HALF_RMS = 2.0**-12  # least size of a router's weights in float16, which has 12 bits left there
BATCH = 4096  # tokens in a training step
LEARNING_RATE = 1e-2
NUMBERS_AT_ONCE = 2**26  # of expert outputs: 256 MB


class Scores(NamedTuple):
    """Affine scores x @ weight.T + bias: (routed, width) and (routed,), fp32. Only their order means anything."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@dataclass(frozen=True)
class Router:
    """A router as the container computes it. `weight` (routed, width) is exact in the stored dtype, `bias` (routed,) fp32."""

    weight: Tensor
    bias: Tensor
    formula: Formula
    active: int

    def gates(self, x: Tensor) -> Tensor:
        """(tokens, routed): `active` times the weight of each expert that runs, so about 1, and 0 for the others."""
        logits = x.float() @ self.weight.T
        scores = logits.sigmoid() if self.formula == "sigmoid" else logits.softmax(-1)
        mask = top(scores + self.bias, self.active)
        chosen = scores * mask
        return self.active * chosen / chosen.sum(-1, keepdim=True)


def top(scores: Tensor, count: int) -> Tensor:
    """Mask (tokens, experts) of the `count` highest scores of each token."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, 1).indices, True)


def shipped(scores: Scores, x: Tensor, formula: Formula, active: int, dtype: torch.dtype) -> Router:
    """The router to store for these scores, seen on tokens x (tokens, width).

    With all experts active there is nothing to choose: zeros, whose weights are exactly 1/active.
    """
    routed = len(scores.bias)
    if active == routed:
        return Router(torch.zeros_like(scores.weight), torch.zeros_like(scores.bias), formula, active)
    spread = (x @ scores.weight.T).std().item()
    scale = 2.0 ** -max(0, _log2(spread / SPREAD)) if spread > 0 else 1.0
    if dtype == torch.float16:
        scale = max(scale, 2.0 ** _log2(HALF_RMS / scores.weight.square().mean().sqrt().item()))
    weight = (scores.weight * scale).to(dtype).float()
    # what rounding took from the scores on average goes back into the bias
    bias = scale * scores.bias + (scale * scores.weight - weight) @ x.mean(0)
    # sigmoid(u) + b ranks as u + 4b does for small u; softmax has no bias to offer
    return Router(weight, bias / 4 if formula == "sigmoid" else torch.zeros_like(bias), formula, active)


def _log2(ratio: float) -> int:
    """The power of two at or above a ratio."""
    return max(-126, min(126, int(torch.tensor(ratio).log2().ceil())))


class RouterTask(NamedTuple):
    """What a router is made from."""

    ffn: FFN
    split: Split
    x: Tensor  # (tokens, width) fp32: inputs of the FFN
    active: int
    affine: bool  # the container has a bias
    steps: int
    generator: torch.Generator  # on the CPU


def expert_outputs(ffn: FFN, split: Split, x: Tensor, hidden: Tensor | None = None) -> Tensor:
    """oᵢ(x) of every routed expert: (tokens, routed, width). `hidden`: ffn.hidden(x), where it is known already."""
    hidden = ffn.hidden(x) if hidden is None else hidden
    return torch.stack([hidden[:, members] @ ffn.down[:, members].T for members in split.on(hidden.device).routed], 1)


def linear(task: RouterTask) -> Scores:
    """Trained to say which experts have the largest outputs ‖oᵢ(x)‖, where it matters: an answer counts by how far the
    output lies from the one that just makes it in, or just fails to."""
    norms = _per_token(task, lambda x: expert_outputs(task.ffn, task.split, x).norm(dim=-1))
    target = top(norms, task.active).float()
    ranked = norms.sort(1, descending=True).values
    border = ranked[:, task.active - 1 : task.active + 1].mean(1, keepdim=True)  # between the last in and the first out
    stake = (norms - border).abs()
    stake = stake / stake.mean().clamp_min(1e-30)

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target[rows], weight=stake[rows])

    return _train(task, loss)


def gate_mean(task: RouterTask) -> Scores:
    """No training: the mean direction of each expert's gate rows, as in EMoE (arXiv 2310.10908)."""
    rows = [F.normalize(task.ffn.gate[members], dim=1).mean(0) for members in task.split.routed]
    weight = torch.stack(rows)
    return Scores(weight, weight.new_zeros(len(rows)))


def prior_approximate(task: RouterTask) -> Scores:
    """FactorLLM's loss (arXiv 2408.11855): KL(softmax r ‖ softmax T), T the mask of the experts closest to y/(E//k).

    x is what the layer really gets; the released code feeds it the FFN output of the layer before, without residual.
    """
    ratio = len(task.split.routed) // task.active

    def distance(x: Tensor) -> Tensor:
        outputs = expert_outputs(task.ffn, task.split, x)
        return (outputs - task.ffn(x)[:, None] / ratio).square().mean(-1)

    target = top(-_per_token(task, distance), task.active).float().log_softmax(1)

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return F.kl_div(target[rows], logits.log_softmax(1), reduction="batchmean", log_target=True)

    return _train(task, loss)


def untrained(task: RouterTask) -> Scores:
    """Random directions: what FactorLLM's released code ends up with, where no loss reaches the router."""
    width = task.x.shape[1]
    weight = torch.randn(len(task.split.routed), width, generator=task.generator) / width**0.5
    return Scores(weight.to(task.x), task.x.new_zeros(len(weight)))


ROUTERS: dict[str, Callable[[RouterTask], Scores]] = {
    "linear": linear,
    "gate-mean": gate_mean,
    "prior-approximate": prior_approximate,
    "random": untrained,
}


def _per_token(task: RouterTask, value: Callable[[Tensor], Tensor]) -> Tensor:
    """`value` of a few tokens at a time."""
    return torch.cat([value(x) for x in task.x.split(tokens_at_once(task.ffn, task.split))])


def tokens_at_once(ffn: FFN, split: Split) -> int:
    """Tokens whose expert outputs have room."""
    return max(1, NUMBERS_AT_ONCE // (ffn.neurons + len(split.routed) * ffn.down.shape[0]))


def _train(task: RouterTask, loss: Callable[[Tensor, Tensor], Tensor]) -> Scores:
    """Adam on standardised inputs, which the scores that are returned do without."""
    x, affine = task.x, task.affine
    centre = x.mean(0) if affine else x.new_zeros(x.shape[1])
    scale = (x - centre).square().mean(0).sqrt().clamp_min(1e-6)
    standard = (x - centre) / scale  # (tokens, width)
    weight = x.new_zeros(len(task.split.routed), x.shape[1]).requires_grad_()
    bias = x.new_zeros(len(task.split.routed)).requires_grad_(affine)
    optimizer = torch.optim.Adam([weight, bias] if affine else [weight], lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, task.steps))
    for _ in range(task.steps):
        rows = torch.randint(len(x), (min(BATCH, len(x)),), generator=task.generator).to(x.device)
        with torch.enable_grad():
            value = loss(standard[rows] @ weight.T + bias, rows)
            value.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    folded = weight.detach() / scale
    return Scores(folded, bias.detach() - folded @ centre)
