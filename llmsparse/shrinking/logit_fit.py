"""The last matrix of the last block, fitted to the logits of the source: behind it there is nothing but the head.

An error of a block's output is not an error of the model: what the head does not look at costs nothing, and a token whose next
is nearly certain costs little. Behind the last block that can be told. W̃ = W + Δ makes the divergence Σ KL(source ‖ made) small:
a few rounds of Newton's method in its Gauss-Newton form, JᵀFJ with F of the softmax, each solved by conjugate gradients; no
matrix of all weights by all weights is ever made. Tokens held back say when to stop.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmsparse.calibration.least_squares import JUDGES
from llmsparse.calibration.matching import HELD_OUT_SHARE
from llmsparse.calibration.matching_loss import LOGITS_AT_ONCE
from llmsparse.models.streamed import Activations, Block, StreamedModel
from llmsparse.ranks.share import Share
from llmsparse.shrinking.folding import adds_up, entering_last, last_matrix
from llmsparse.sparsity.patterns import is_sparse

ROUNDS, STEPS = 8, 3  # of Newton's method, and of conjugate gradients in each
DAMP = 0.3  # of the curvature along the gradient
PATIENCE = 3  # steps without a gain on the tokens held back
LEAST_GAIN = 0.01  # of the divergence: a round that gains less is the last
AT_ONCE = 1024  # tokens, at most: a model makes masks of their square
HELD = 2**28  # numbers held of tokens, at most: half a GB in bfloat16
MATRICES = 9  # of the size of the weight, in fp32: what a step holds, measured
LOGITS = 8  # of as many tokens as are worked on at once, in fp32: the curvature's


def fit_to_logits(made: Block, acts: Activations, model: StreamedModel, aims: list[Tensor]) -> dict[str, Any] | None:
    """Fit the last matrix of `made`, in `made.stored`, and `made.reload()`; `acts` enter it, `aims` are what came out of the
    source's last block, (batch, tokens, width) a batch held here. Returns {"before", "after"}, nats a token held back; None where no fit
    is better, or the matrix does not add to the output as it is. `model`: what `made` is the last block of."""
    weight = last_matrix(made.weights, model.hidden_size)
    if weight is None:
        return None
    most = tokens_at_most(weight.shape[1], model.hidden_size)
    share = acts.share
    batches = range(0, share.total, -(-share.tokens // most))
    if len(batches) < 2:
        return None
    device = made.module.get_parameter(weight.slot[0]).device
    start = made.view(weight).to(device, torch.float32, copy=True)  # (out, in)
    if is_sparse(start) or not share.ranks.known(lambda: adds_up(made, acts, weight, start)):
        return None
    parts: dict[int, Tokens] = {}
    for batch in batches:
        if batch in share.numbers:
            place = share.place(batch)
            entering, output = entering_last(made, acts, place, weight.slot)
            entering = entering.to(model.dtype)  # as it was: nothing is lost
            parts[batch] = Tokens(model, entering, output.flatten(0, -2), aims[place].to(device).flatten(0, -2))

    found = _Descent(share, parts, batches[::HELD_OUT_SHARE], start.new_zeros(start.shape))
    before = found.least
    for _ in range(ROUNDS):
        if not found.round():
            break
    if not found.least < before:
        return None
    made.stored = made.stored | {weight.key: made.stored[weight.key].clone()}
    with share.ranks.together():
        made.store(weight, start + found.best)
    made.reload({weight.key})
    return {"projection": weight.name, "before": before, "after": found.least}


def tokens_at_most(inputs: int, width: int) -> int:
    """So many that no more than HELD numbers are held of what enters the matrix, of outputs and of aims."""
    return max(1, min(JUDGES, HELD // (inputs + 2 * width)))


def fit_bytes(model: StreamedModel, inputs: int, share: Share) -> int:
    """An estimate of what the fit of a matrix (width, inputs) holds, of these batches: tokens of them, the head, matrices of the
    size of the weight, and logits."""
    width, itemsize, vocabulary = model.hidden_size, model.dtype.itemsize, model.vocabulary
    held = min(share.most_tokens, tokens_at_most(inputs, width)) * (inputs + 2 * width) * itemsize
    at_once = min(share.most_tokens, _at_once(vocabulary))
    matrices = MATRICES - 1 + share.sums_at_once
    return held + vocabulary * width * itemsize + 4 * (matrices * inputs * width + LOGITS * at_once * vocabulary)


def _at_once(vocabulary: int) -> int:
    return min(AT_ONCE, max(1, LOGITS_AT_ONCE // vocabulary))


class _Descent:
    """Where Newton's method is: Δ (out, in), and the best so far of those that were judged. `parts`: tokens of batches that
    are held here, of which `judges` are not fitted on."""

    def __init__(self, share: Share, parts: Mapping[int, Tokens], judges: Sequence[int], start: Tensor) -> None:
        self._share, self._parts, self._judges = share, parts, judges
        self._change = self.best = start
        self.least = self._judge(start)

    def round(self) -> bool:
        """One step of Newton's method; False where little is to be had any more."""
        residual = self._summed(partial(Tokens.gradient, change=self._change)).neg_()
        step, direction, size = torch.zeros_like(residual), residual.clone(), residual.square().sum()
        damping, idle, before = 0.0, 0, self.least
        for _ in range(STEPS):
            if not size > 0 or idle == PATIENCE:
                break
            curved = self._summed(partial(Tokens.curvature, change=self._change, direction=direction))
            damping = damping or DAMP * ((direction * curved).sum() / size).item()
            curved.add_(direction, alpha=damping)
            length = (size / (direction * curved).sum()).item()
            step.add_(direction, alpha=length)
            residual.sub_(curved, alpha=length)
            del curved
            size, last = residual.square().sum(), size
            direction.mul_(size / last).add_(residual)
            error = self._judge(self._change + step)
            idle = 0 if error < self.least else idle + 1
            if error < self.least:
                self.best, self.least = self._change + step, error
        self._change = self.best
        return self.least < (1 - LEAST_GAIN) * before and idle < PATIENCE

    def _judge(self, change: Tensor) -> float:
        """Nats a token that is held back."""
        here = {batch: self._parts[batch].divergence(change) for batch in self._judges if batch in self._parts}
        tokens = [windows * tokens for windows, tokens in (self._share.shapes[batch] for batch in self._judges)]
        return sum(self._share.collected(here).values()) / sum(tokens)

    def _summed(self, term: Callable[[Tokens], Tensor]) -> Tensor:
        """Over all tokens that are fitted on."""

        def leaf(number: int) -> list[Tensor | None]:
            total: Tensor | None = None
            for batch in self._share.leaves[number]:
                if batch in self._parts and batch not in self._judges:
                    total = both(total, term(self._parts[batch]))
            return [total]

        [total] = self._share.summed_for_all(leaf, both, [1])
        assert total is not None
        return total


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two, either of which may not be there, in the place of the first."""
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


@dataclass(frozen=True)
class Tokens:
    """Some tokens behind the last block."""

    model: StreamedModel
    h: Tensor  # (tokens, in): what enters the matrix
    output: Tensor  # (tokens, width), of the block as it was
    aim: Tensor  # (tokens, width), of the source

    @torch.no_grad()
    def divergence(self, change: Tensor) -> float:
        """Σ KL(source ‖ made) with W + Δ."""
        total = 0.0
        for h, output, aim in self._some():
            wanted, made = self._logits(aim).log_softmax(-1), self._logits(output + h @ change.T).log_softmax(-1)
            total += (wanted.exp() * (wanted - made)).sum().item()
        return total

    def gradient(self, change: Tensor) -> Tensor:
        """Of that by Δ, (out, in)."""
        total = torch.zeros_like(change)
        for h, output, aim in self._some():
            point = (output + h @ change.T).requires_grad_()
            with torch.enable_grad():
                logits = self._logits(point)
            with torch.no_grad():
                wrong = logits.softmax(-1) - self._logits(aim).softmax(-1)
            total += torch.autograd.grad(logits, point, wrong)[0].T @ h
        return total

    def curvature(self, change: Tensor, direction: Tensor) -> Tensor:
        """Its second derivative times a direction (out, in), without that of the logits themselves."""
        total = torch.zeros_like(change)
        for h, output, _ in self._some():
            point = (output + h @ change.T).requires_grad_()
            with torch.enable_grad():
                logits = self._logits(point)
                some = torch.zeros_like(logits, requires_grad=True)
                (back,) = torch.autograd.grad(logits, point, some, create_graph=True)  # linear in `some`: Jᵀ
            (along,) = torch.autograd.grad(back, some, h @ direction.T, retain_graph=True)  # J times that
            with torch.no_grad():
                p = logits.softmax(-1)
                weighed = p * (along - (p * along).sum(-1, keepdim=True))
            total += torch.autograd.grad(logits, point, weighed)[0].T @ h
        return total

    def _some(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As many as are worked on at once, in fp32."""
        at_once = _at_once(self.model.vocabulary)
        for h, output, aim in zip(*(one.split(at_once) for one in (self.h, self.output, self.aim)), strict=True):
            yield h.float(), output.float(), aim

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden[None].to(self.model.dtype))[0].float()  # (tokens, vocabulary)
