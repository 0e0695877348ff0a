"""The norms of a packed model on the CPU, in one pass of a C kernel: those that do on a random token what the kernel does."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse.backends.cpu import norm
from llmsparse.backends.cpu.library import DTYPES
from llmsparse.inference.gradient import wants_gradient
from llmsparse.inference.lean import LeanLayer

EPSILONS = ("variance_epsilon", "eps")  # what transformers' models call it


class LeanNorm(nn.Module):
    """Mixed into the class of a norm by `quicken_norms`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (..., width) → (..., width)."""
        weight = self._parameters["weight"]
        if torch.compiler.is_compiling() or x.dtype != weight.dtype or not (x.is_cpu and weight.is_cpu):
            return super().forward(x)
        if wants_gradient(x, weight) or x.dtype not in DTYPES:
            return super().forward(x)
        return norm.rms_norm(x, weight, epsilon(self) or 0.0)


def quicken_norms(model: nn.Module) -> None:
    """Let the norms of a model on the CPU run by the kernel."""
    if norm.why_not() is not None:
        return
    for module in model.modules():
        if _is_rms_norm(module):
            module.__class__ = _lean(type(module))


def slow_down_norms(model: nn.Module) -> None:
    """Let them run as before."""
    for module in model.modules():
        if isinstance(module, LeanNorm):
            module.__class__ = type(module).__mro__[2]


def lean_norms(model: nn.Module) -> Iterator[LeanLayer]:
    """What runs by the kernel."""
    for name, module in model.named_modules():
        if isinstance(module, LeanNorm):
            yield LeanLayer(name, "cpu-norm", None, "one pass where torch makes six tensors")


def epsilon(module: Any) -> float | None:
    """What a norm adds to the mean; None where it does not say."""
    return next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)


def _is_rms_norm(module: nn.Module) -> bool:
    weight, eps = module._parameters.get("weight"), epsilon(module)
    if eps is None or weight is None or weight.dim() != 1 or len(module._parameters) > 1 or "_hf_hook" in vars(module):
        return False
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or isinstance(module, LeanNorm):
        return False
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, weight.shape[0], generator=generator)).to(weight.dtype)
    with torch.no_grad():
        try:
            own = module(x)
        except (TypeError, ValueError, RuntimeError):  # it takes something else than a token
            return False
        if not isinstance(own, Tensor) or own.shape != x.shape or own.dtype != x.dtype:
            return False
        return torch.allclose(
            norm.rms_norm(x, weight, eps), own, rtol=1e-6 if own.dtype == torch.float32 else 0, atol=0
        )


@cache
def _lean(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Lean{kind.__name__}", (LeanNorm, kind), {})
