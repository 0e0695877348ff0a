"""The gradient of a packed product: for adapters on top of packed layers, and for biases. The weight itself has none."""

# pyright: reportUnknownMemberType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Product(Protocol):
    """A packed matrix (out, in)."""

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor: ...

    def dense(self) -> Tensor: ...


class PackedProduct(torch.autograd.Function):
    """y = x · Wᵀ + b, and ∂L/∂x = ∂L/∂y · W, ∂L/∂b = Σ ∂L/∂y over tokens.

    Forward is the backend's own; W is unpacked again for the way back instead of being kept for it, or the dense weights
    of all layers would lie in memory at once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: Product) -> Tensor:
        """x (..., in), bias (out,) → (..., out)."""
        ctx.matrix, ctx.dtype = matrix, x.dtype
        return matrix.run(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """grad (..., out) → (..., in), (out,)."""
        of_x, of_bias = None, None
        if ctx.needs_input_grad[0]:
            weight: Tensor = ctx.matrix.dense()
            of_x = (grad.to(weight.dtype) @ weight).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return of_x, of_bias, None


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Somebody will ask for the gradient of one of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
