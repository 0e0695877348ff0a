"""What tuning minimises: four terms that hold a mixture to its dense teacher, and the loss it was first trained with.

    kl         KL(teacher ‖ student) of the next token, per token
    layer      ‖y − ŷ‖² / ‖y‖² of each FFN's output against the teacher's, mean of tokens, summed over layers
    router     what the router says against what it should, on the teacher's own FFN inputs, summed over layers
    balance    E · Σ fᵢ Pᵢ of each layer (Switch, arXiv 2101.03961), less its least value 1, summed over layers
    language   cross-entropy of the next token of the text itself, per token

The router is judged on what enters the *teacher's* FFN, where the best choice is known: oᵢ(x) of every expert can be
computed. FactorLLM's released code gives layer l the bare FFN output of layer l − 1 instead, which no FFN ever sees.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmsparse.factorization.oracle import greedy
from llmsparse.factorization.router import top
from llmsparse.tuning.mixture import Mixture

TERMS: tuple[str, ...] = ("kl", "layer", "router", "balance", "language")
OUTPUTS_AT_ONCE = 2**26  # numbers in the outputs of all experts, computed together: 256 MB in fp32


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) at temperature 1, mean of tokens; logits (batch, tokens, vocabulary)."""
    said, wanted = (logits.flatten(0, 1).float().log_softmax(-1) for logits in (student, teacher))
    return F.kl_div(said, wanted, reduction="batchmean", log_target=True)


def language(student: Tensor, ids: Tensor) -> Tensor:
    """Mean −log p of each token after the first; ids (batch, tokens)."""
    return F.cross_entropy(student[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def layer_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖y − ŷ‖² / ‖y‖²; (..., hidden). A few tokens of huge norm do not drown the others."""
    target = target.float()
    error = (output.float() - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp_min(1e-12)).mean()


def balance(scores: Tensor, chosen: Tensor) -> Tensor:
    """E · Σ fᵢ Pᵢ − 1: 0 where all experts run alike. scores (tokens, routed), chosen (tokens, active) int64."""
    experts = scores.shape[1]
    share = torch.zeros_like(scores).scatter_(1, chosen, 1.0).mean(0) / chosen.shape[1]  # f: of the expert slots
    return experts * (share * scores.softmax(-1).mean(0)).sum() - 1


def greedy_loss(mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy to the experts that, taken one after the other, leave least of what the shared ones do not give."""

    def best(x: Tensor, y: Tensor) -> Tensor:
        return greedy(mixture.expert_outputs(x).float(), mixture.active, y - mixture.shared_output(x).float())

    return _cross_entropy(mixture, x, _labels(best, mixture, x, y))


def norm_loss(mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy to the experts with the largest outputs ‖oᵢ(x)‖."""

    def loudest(x: Tensor, y: Tensor) -> Tensor:
        return top(mixture.expert_outputs(x).float().norm(dim=-1), mixture.active)

    return _cross_entropy(mixture, x, _labels(loudest, mixture, x, y))


def prior_approximate_loss(mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
    """FactorLLM's L_PA: KL(softmax r ‖ softmax T), T the 0/1 mask of the experts closest, one by one, to
    what the shared experts leave of y.

    An expert is taken with the factor it is stored with, which is theirs where it is E//k. Both softmaxes and the
    direction of the divergence are theirs; it is the mean of all tokens, not the first window's.
    """

    def closest(x: Tensor, y: Tensor) -> Tensor:
        left = y - mixture.shared_output(x).float()
        return top(-(mixture.expert_outputs(x).float() - left[:, None]).square().mean(-1), mixture.active)

    wanted = _labels(closest, mixture, x, y).float().log_softmax(1)
    said = mixture.scores(mixture.logits(x)).log_softmax(1)
    return F.kl_div(wanted, said, reduction="batchmean", log_target=True)


RouterLoss = Callable[[Mixture, Tensor, Tensor], Tensor]  # x, y (tokens, hidden): into and out of the teacher's FFN
ROUTER_LOSSES: dict[str, RouterLoss] = {
    "greedy": greedy_loss,
    "norm": norm_loss,
    "prior-approximate": prior_approximate_loss,
}


@torch.no_grad()
def _labels(choose: Callable[[Tensor, Tensor], Tensor], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
    """Mask (tokens, routed) of the right experts, found for a few tokens at a time."""
    count = max(1, OUTPUTS_AT_ONCE // (mixture.routed * x.shape[1]))
    return torch.cat([choose(*part) for part in zip(x.split(count), y.float().split(count), strict=True)])


def _cross_entropy(mixture: Mixture, x: Tensor, right: Tensor) -> Tensor:
    """Mean −log of the softmax over experts at the right ones; right (tokens, routed) bool."""
    said = mixture.scores(mixture.logits(x)).log_softmax(1)
    return -(said * right).sum(1).mean() / mixture.active
