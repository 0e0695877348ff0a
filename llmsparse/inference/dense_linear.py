"""Linear layers that stay dense in a packed model, such as its head: for few tokens by the C kernel of `cpu-dense`.

A tied head runs from the embedding's own memory. More tokens at once, gradients, autocast and `torch.compile` are left to torch.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmsparse.backends.cpu import dense
from llmsparse.backends.cpu_dense import why_not
from llmsparse.inference.gradient import wants_gradient
from llmsparse.inference.lean import LeanLayer

LEAST = 2**18  # weights; torch is as fast with fewer, which stay in the cache


class DenseLinear(nn.Linear):
    """An `nn.Linear` by another way of multiplying. Made of one that is there by `quicken`, and back by `slow_down`."""

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) → (..., out)."""
        return dense.matvec(self.weight, input, self.bias) if self._fits(input) else super().forward(input)

    def _fits(self, x: Tensor) -> bool:
        weight = self.weight
        if torch.compiler.is_compiling() or type(weight) is not nn.Parameter or x.dtype != weight.dtype:
            return False
        if not 0 < x.numel() <= most_tokens(weight) * weight.shape[1] or not weight.is_contiguous():
            return False
        return not torch.is_autocast_enabled("cpu") and not wants_gradient(x, weight, self.bias)


def quicken(model: nn.Module) -> None:
    """Let the dense linear layers of a model on the CPU run by the kernel, where it is of use."""
    for module in model.modules():
        if type(module) is nn.Linear and (weight := module.weight).numel() >= LEAST:
            module.__class__ = DenseLinear if why_not(weight.device, weight.dtype) is None else nn.Linear


def slow_down(model: nn.Module) -> None:
    """Let them run by torch again."""
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, DenseLinear)]
    for layer in layers:
        layer.__class__ = nn.Linear


def lean_linears(model: nn.Module) -> Iterator[LeanLayer]:
    """The layers of a model that the kernel runs."""
    for name, module in model.named_modules():
        if isinstance(module, DenseLinear) and (tokens := most_tokens(module.weight)):
            yield LeanLayer(name, "cpu-dense", tokens, "not packed; read where it lies, by a faster loop than torch's")


def most_tokens(weight: Tensor) -> int:
    """Up to how many tokens at once the kernel runs; 0 where it cannot."""
    usable = why_not(weight.device, weight.dtype) is None
    return dense.kernel_rows(weight.dtype, weight.shape[1]) if usable else 0
