"""The down projection of a routed FFN, fitted in closed form to the output of the dense one.

With gates g(x) the FFN computes ŷ = W̃ (g ⊙ h). `fit_scales` finds one factor per expert, `refit` the whole of W̃:
argmin Σ ‖y − W̃ (g ⊙ h)‖² + λ‖W̃ − W‖², from normal equations that are summed up over tokens, so that calibration can
be as long as it likes.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.router import Router, expert_outputs, tokens_at_once
from llmsparse.factorization.split import Split

DAMP = 0.01  # λ, as a fraction of the mean of the diagonal
ESCALATION = 10.0
ATTEMPTS = 5


def routed_hidden(ffn: FFN, split: Split, router: Router, x: Tensor) -> Tensor:
    """g ⊙ h: what the down projection of the mixture sees, (tokens, neurons); shared neurons always, routed gated."""
    gates = router.gates(x)
    always = gates.new_ones(len(gates), 1)
    return ffn.hidden(x) * torch.cat([gates, always], 1)[:, split.owner.to(x.device)]


def scaled(ffn: FFN, split: Split, factors: Tensor) -> FFN:
    """The FFN with the down projection of expert i times factors[i]; the last factor is that of the shared neurons."""
    return FFN(ffn.gate, ffn.up, ffn.down * factors.to(ffn.down)[split.owner.to(ffn.down.device)])


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
        shared = ffn.hidden(x)[:, split.shared] @ ffn.down[:, split.shared].T
        outputs = expert_outputs(ffn, split, x)
        parts = torch.cat([outputs * router.gates(x)[..., None], shared[:, None]], 1)  # (tokens, routed + 1, width)
        products += torch.einsum("tid,tjd->ij", parts, parts).double().cpu()
        targets += torch.einsum("tid,td->i", parts, shared + outputs.sum(1)).double().cpu()
    damping = DAMP * products.diagonal().mean() * torch.eye(count, dtype=torch.float64)
    return torch.linalg.solve(products + damping, targets + damping.diagonal()).float()  # λ pulls towards 1


Scaling = Callable[[FFN, Split, Router, Iterable[Tensor]], Tensor]
SCALES: dict[str, Scaling] = {"fitted": fit_scales, "ratio": ratio_scales, "none": no_scales}


def refit(
    dense: FFN, start: FFN, split: Split, router: Router, inputs: Iterable[Tensor], damp: float = DAMP
) -> tuple[FFN, dict[str, Any]]:
    """`start` with the down projection that brings the routed output closest to that of `dense`; notes say how.

    `inputs` are (tokens, width) each. Neurons that never run on them keep their column. NumericalError where no
    damping makes the equations solvable.
    """
    device = start.down.device
    gram = torch.zeros(start.neurons, start.neurons, device=device)
    targets = torch.zeros(start.neurons, len(start.down), device=device)
    for x in _chunks(dense, split, inputs):
        hidden = routed_hidden(start, split, router, x)  # (tokens, neurons)
        gram += hidden.T @ hidden
        targets += hidden.T @ dense(x)
    diagonal = gram.diagonal().mean().item()
    if diagonal == 0:
        return start, {"refit": "skipped: no neuron that runs says anything on the calibration text"}
    used = damp
    for _ in range(ATTEMPTS):
        damping = used * diagonal
        regular = gram.clone()
        regular.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(regular)
        if not failed and torch.isfinite(factor.diagonal()).all():
            down = torch.cholesky_solve(targets + damping * start.down.T, factor).T.contiguous()
            notes = {} if used == damp else {"damp": used}
            return FFN(start.gate, start.up, down), notes
        used *= ESCALATION
    raise NumericalError(
        f"the equations of the refit are not positive definite, even with a damping of {used:g}; use --no-refit"
    )


def _chunks(ffn: FFN, split: Split, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The inputs in fp32 on the FFN's device, a few tokens at a time."""
    for x in inputs:
        for part in x.split(tokens_at_once(ffn, split)):
            yield part.to(ffn.down.device, torch.float32)
