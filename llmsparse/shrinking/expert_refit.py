"""A factor on what each expert gives, fitted so that those that are left come closest to what all of them gave.

argmin_s Σ ‖y − Σ_j s_j g_j f_j‖², where y is the output of all experts, g and f those of the smaller mixture on the same
tokens. The factor is folded into the expert's last projection. Tokens of one batch in eight are not fitted on: they judge
whether the factors help.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.calibration.least_squares import fit_factors
from llmsparse.calibration.matching import HELD_OUT_SHARE
from llmsparse.models.streamed import Activations, Block
from llmsparse.scoring.mixture import Call, Mixture, intercepted

NUMBERS_AT_ONCE = 2**24  # of what experts give to some tokens
DAMPS = (0.01, 0.1, 1.0)
LEAST_GAIN = 0.01  # of the error: less is not worth rounding weights anew
NOISE = 1e-6  # an error that is nothing but rounding, in float32


class Equations(NamedTuple):
    """Σ of products of what experts add with each other and with y, and Σ ‖y‖², float64."""

    products: Tensor  # (experts, experts)
    targets: Tensor  # (experts,)
    energy: Tensor  # ()

    @classmethod
    def empty(cls, experts: int) -> Equations:
        shapes: list[tuple[int, ...]] = [(experts, experts), (experts,), ()]
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, index: Tensor, parts: Tensor, target: Tensor) -> None:
        """Take in tokens: numbers of experts (tokens, k), what each adds (tokens, k, width), and y (tokens, width)."""
        experts, there = len(self.targets), index < len(self.targets)
        index, parts, target = index.where(there, 0), parts.float() * there[..., None], target.float()
        between = (parts @ parts.transpose(1, 2)).double().cpu()  # (tokens, k, k)
        place = (index[:, :, None] * experts + index[:, None, :]).cpu()
        self.products.view(-1).index_add_(0, place.flatten(), between.flatten())
        along = (parts @ target[..., None])[..., 0].double().cpu()
        self.targets.index_add_(0, index.flatten().cpu(), along.flatten())
        self.energy.add_(target.square().sum().double().cpu())

    def error(self, factors: Tensor) -> float:
        """Σ ‖y − Σ s g f‖² over Σ ‖y‖²."""
        s = factors.double()
        return float((s @ self.products @ s - 2 * self.targets @ s + self.energy) / self.energy.clamp_min(1e-300))


def refit_experts(made: Block, acts: Activations, mixture: Mixture, targets: Sequence[Tensor]) -> dict[str, Any]:
    """Fit and fold in the factors in `made.stored` where they help; returns what is to be said of it.

    `mixture` is that of the made block; `targets` are (tokens, width) of every batch: what all experts gave.
    """
    if len(targets) < 2:
        return {"kept": False, "why": "one batch of calibration: none to judge by"}
    fitted, judge = Equations.empty(mixture.experts), Equations.empty(mixture.experts)
    for batch, target in enumerate(targets):
        equations = judge if batch % HELD_OUT_SHARE == 0 else fitted
        with suppress(_Seen), _parts(made, mixture, target, equations):
            made.call(acts, batch)
    ones = torch.ones(mixture.experts, dtype=torch.float64)
    before = judge.error(ones)
    tried = [fit_factors(fitted.products, fitted.targets, damp) for damp in DAMPS]
    factors = min(tried, key=judge.error)
    after = judge.error(factors)
    helps = before > max(NOISE, 4 * torch.finfo(targets[0].dtype).eps ** 2) and after < (1 - LEAST_GAIN) * before
    if helps:
        fold(made, mixture, factors)
    return {"kept": helps, "error_before": before, "error_after": after} | (
        {"factors": factors.tolist()} if helps else {}
    )


def fold(made: Block, mixture: Mixture, factors: Tensor) -> None:
    """Multiply what each expert gives, its bias too, in `made.stored` and in the module."""
    name, _, leaf = mixture.down.rpartition(".")
    experts = dict(made.module.get_submodule(name).named_parameters(recurse=False))
    scaled = {f"{name}.{one}": value for one, value in experts.items() if one == leaf or _is_bias_of(one, leaf)}
    matrices = {weight.key: weight.slot[0] for weight in made.weights}
    stored = made.in_module(
        {key: value for key, value in made.stored.items() if matrices.get(key, name) in (name, mixture.down)}
    )
    changed: dict[str, Tensor] = {}
    for parameter in scaled:
        value = stored[parameter].float()
        changed[parameter] = value * factors.float().view(-1, *[1] * (value.dim() - 1))
    for key, value in made.on_disk(changed).items():
        made.stored[key] = value.to(made.stored[key].dtype).contiguous()
    made.reload()


def _is_bias_of(name: str, weight: str) -> bool:
    return name.startswith(weight.removesuffix("weight")) and name.endswith("bias")


class _Seen(Exception):
    """What experts give is known; the rest of the block need not run."""


def _parts(made: Block, mixture: Mixture, target: Tensor, equations: Equations) -> AbstractContextManager[None]:
    """Within it, what the experts of the block add to each token goes into `equations`, and the block's run ends."""

    def collect(call: Call) -> Tensor:
        at_once = max(1, NUMBERS_AT_ONCE // (call.index.shape[1] * target.shape[1]))
        for rows in torch.arange(len(call.index), device=call.index.device).split(at_once):
            parts = call.parts(rows)
            equations.add(call.index[rows], parts, target[rows.to(target.device)].to(parts.device))
        raise _Seen

    return intercepted(made, mixture, collect)
