"""The down projection of a routed FFN, fitted in closed form to the output of the dense one.

With gates g(x) the FFN computes ŷ = W̃ (g ⊙ h). `fit_scales` finds one factor per expert, `refit` the whole of W̃:
argmin Σ ‖y − W̃ (g ⊙ h)‖² + λ‖W̃ − W‖², from normal equations that are summed up over tokens, so that calibration can
be as long as it likes (calibration/least_squares).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmsparse.calibration.least_squares import DAMPS, HELD_BACK, JUDGES, fit, fit_factors
from llmsparse.errors import NumericalError
from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.router import Router, expert_outputs, tokens_at_once
from llmsparse.factorization.split import Split
from llmsparse.ranks.group import ALONE
from llmsparse.ranks.share import Share

SCALE_DAMP = 0.01  # λ of the scales, as a fraction of the mean of the diagonal


def routed_hidden(ffn: FFN, split: Split, router: Router, x: Tensor) -> Tensor:
    """g ⊙ h: what the down projection of the mixture sees, (tokens, neurons)."""
    return gated(ffn.hidden(x), split, router.gates(x))


def gated(hidden: Tensor, split: Split, gates: Tensor) -> Tensor:
    """h (tokens, neurons) with each routed neuron times the gate of its expert, (tokens, routed); shared ones as they are."""
    always = gates.new_ones(len(gates), 1)
    return hidden * torch.cat([gates, always], 1)[:, split.on(hidden.device).owner]


def scaled(ffn: FFN, split: Split, factors: Tensor) -> FFN:
    """The FFN with the down projection of expert i times factors[i]; the last factor is that of the shared neurons."""
    return FFN(ffn.gate, ffn.up, ffn.down * factors.to(ffn.down)[split.on(ffn.down.device).owner])


def no_scales(ffn: FFN, split: Split, router: Router, inputs: Iterable[Tensor]) -> Tensor:
    """Every expert adds what it added before."""
    return torch.ones(len(split.routed) + 1)


def ratio_scales(ffn: FFN, split: Split, router: Router, inputs: Iterable[Tensor]) -> Tensor:
    """FactorLLM's: the number of experts over the number that run, rounded down."""
    return torch.tensor([*[float(len(split.routed) // router.active)] * len(split.routed), 1.0])


def fit_scales(ffn: FFN, split: Split, router: Router, inputs: Iterable[Tensor]) -> Tensor:
    """The factor of each routed expert, and of the shared neurons, with the least output error: (routed + 1,)."""
    count = len(split.routed) + 1
    products = torch.zeros(count, count, dtype=torch.float64)
    targets = torch.zeros(count, dtype=torch.float64)
    for x in _chunks(ffn, split, inputs):
        hidden = ffn.hidden(x)
        members = split.on(hidden.device).shared
        shared = hidden[:, members] @ ffn.down[:, members].T
        outputs = expert_outputs(ffn, split, x, hidden)
        parts = torch.cat([outputs * router.gates(x)[..., None], shared[:, None]], 1)  # (tokens, routed + 1, width)
        products += torch.einsum("tid,tjd->ij", parts, parts).double().cpu()
        targets += torch.einsum("tid,td->i", parts, shared + outputs.sum(1)).double().cpu()
    return fit_factors(products, targets, SCALE_DAMP).float()


Scaling = Callable[[FFN, Split, Router, Iterable[Tensor]], Tensor]
SCALES: dict[str, Scaling] = {"fitted": fit_scales, "ratio": ratio_scales, "none": no_scales}


def refit(
    dense: FFN, start: FFN, split: Split, router: Router, inputs: Sequence[Tensor], share: Share | None = None
) -> tuple[FFN, dict[str, Any]]:
    """`start` with the down projection that brings the routed output closest to that of `dense`; notes say how.

    `inputs` are (tokens, width) each; of several processes those of the batches that this one holds, and the first one gets
    the result, others `start`. Neurons that never run on them keep their column, and all of them do where no fit is better
    on the tokens held back. NumericalError where no damping makes the equations solvable.
    """
    share = share or Share(ALONE, tuple((1, len(x)) for x in inputs))
    order = torch.cat([split.shared, *split.routed]).to(start.down.device)  # experts as spans of neurons
    arranged = FFN(dense.gate[order], dense.up[order], dense.down[:, order])

    def leaf(number: int) -> list[Equations]:
        sizes = [len(members) for members in split.routed]
        equations = Equations(start.neurons, sizes, len(start.down), order.device)
        seen = share.tokens_before(number)
        for x in _chunks(dense, split, [inputs[share.place(batch)] for batch in share.leaves[number]]):
            hidden, gates = arranged.hidden(x), router.gates(x)  # (tokens, neurons), (tokens, routed)
            target = hidden @ arranged.down.T  # (tokens, width)
            judge = torch.arange(seen, seen + len(x), device=x.device) % HELD_BACK == HELD_BACK - 1
            seen += len(x)
            if sum(len(held) for held, _ in equations.judges) < JUDGES // len(share.leaves):
                equations.judges.append((equations.gated(hidden[judge], gates[judge]), target[judge]))
            equations.add(hidden[~judge], gates[~judge], target[~judge])
        return [equations]

    [total] = share.summed(leaf, Equations.merge, [0])
    with share.ranks.together():
        return (start, {}) if total is None else solved(total, start, order)


def solved(total: Equations, start: FFN, order: Tensor) -> tuple[FFN, dict[str, Any]]:
    """`start` fitted to equations of its neurons in this order, and notes."""
    gram = total.gram()
    if not gram.any():
        return start, {"refit": "no neuron that runs says anything on the calibration text"}
    fitted = fit(gram, total.targets, start.down[:, order], total.judges)
    if not fitted.solved:
        raise NumericalError(
            f"the equations of the refit are not positive definite, even with a damping of {DAMPS[-1]:g}; use --no-refit"
        )
    if fitted.damp is None:
        return start, {"refit": "no fit is better on the tokens held back"}
    return FFN(start.gate, start.up, fitted.weight[:, order.argsort()]), {"damp": fitted.damp}


class Equations:
    """HᵀH and HᵀY of a routed FFN, summed up over tokens; of each expert only the tokens that it runs for are touched.

    Neurons are in the order of the experts, the shared ones first; `sizes` counts those of each routed expert. Of HᵀH, which
    is symmetric, rows of an expert are kept as far as its own columns.
    """

    def __init__(self, neurons: int, sizes: Sequence[int], width: int, device: torch.device) -> None:
        self.targets = torch.zeros(neurons, width, device=device)  # HᵀY
        self.judges: list[tuple[Tensor, Tensor]] = []  # g ⊙ h and y of tokens held back
        self._shared, self._sizes = neurons - sum(sizes), sizes
        spans = [slice(0, self._shared), *self._spans()]
        self._strips = [torch.zeros(span.stop - span.start, span.stop, device=device) for span in spans]

    def add(self, hidden: Tensor, gates: Tensor, target: Tensor) -> None:
        """Take in h (tokens, neurons), which is overwritten, gates (tokens, routed) and y (tokens, width)."""
        shared = self._shared
        hidden = self.gated(hidden, gates)
        always = hidden[:, :shared]
        self._strips[0] += always.T @ always
        self.targets[:shared] += always.T @ target
        for expert, span in enumerate(self._spans()):
            rows = gates[:, expert].nonzero()[:, 0]
            seen = hidden[rows]
            self._strips[1 + expert] += seen[:, span].T @ seen[:, : span.stop]
            self.targets[span] += seen[:, span].T @ target[rows]

    def _spans(self) -> Iterator[slice]:
        """Neurons of each routed expert."""
        start = self._shared
        for size in self._sizes:
            yield slice(start, start + size)
            start += size

    def merge(self, other: Equations) -> Equations:
        """These, with those of later tokens."""
        self.targets += other.targets
        self.judges += other.judges
        for own, one in zip(self._strips, other._strips, strict=True):
            own += one
        return self

    def gated(self, hidden: Tensor, gates: Tensor) -> Tensor:
        """g ⊙ h, in place."""
        owner = torch.repeat_interleave(torch.tensor(self._sizes, device=gates.device))
        hidden[:, self._shared :] *= gates[:, owner]
        return hidden

    def gram(self) -> Tensor:
        """HᵀH, (neurons, neurons); what it was summed up in is let go of."""
        neurons = self._strips[-1].shape[1]
        gram = self.targets.new_zeros(neurons, neurons)
        for strip in self._strips:
            rows, stop = strip.shape
            start = stop - rows
            gram[start:stop, :stop] = strip
            gram[:start, start:stop] = strip[:, :start].T
        self._strips.clear()
        return gram


def _chunks(ffn: FFN, split: Split, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The inputs in fp32 on the FFN's device, a few tokens at a time."""
    for x in inputs:
        for part in x.split(tokens_at_once(ffn, split)):
            yield part.to(ffn.down.device, torch.float32)
