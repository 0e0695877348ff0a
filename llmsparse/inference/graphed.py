"""Packed products in graphs that `torch.compile` makes: an op of torch for backends whose kernels it cannot trace through.

    llmsparse::packed_linear(x, bias, handle, out)          x · Wᵀ + bias
    llmsparse::packed_linear_backward(grad, handle, width)  grad · W

A weight is named by a number: what a backend makes of it is its own affair, and stays out of the graph.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false
from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Product(Protocol):
    """A packed matrix (out, in)."""

    handle: int

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor: ...

    def dense(self) -> Tensor: ...


_HELD: WeakValueDictionary[int, Product] = WeakValueDictionary()
_NUMBERS = itertools.count()


def name(matrix: Product) -> int:
    """A number by which graphs know a matrix, as long as it lives."""
    number = next(_NUMBERS)
    _HELD[number] = matrix
    return number


@torch.library.custom_op("llmsparse::packed_linear", mutates_args=())
def packed_linear(x: Tensor, bias: Tensor | None, handle: int, out: int) -> Tensor:
    """x (..., in) → (..., out)."""
    return _HELD[handle].run(x, bias)


@packed_linear.register_fake
def _(x: Tensor, bias: Tensor | None, handle: int, out: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


@torch.library.custom_op("llmsparse::packed_linear_backward", mutates_args=())
def packed_linear_backward(grad: Tensor, handle: int, width: int) -> Tensor:
    """grad (..., out) → (..., in)."""
    return grad @ _HELD[handle].dense()


@packed_linear_backward.register_fake
def _(grad: Tensor, handle: int, width: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], width))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.handle, _ = inputs
    ctx.width, ctx.of_bias = x.shape[-1], bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    of_x = packed_linear_backward(grad, ctx.handle, ctx.width) if ctx.needs_input_grad[0] else None
    of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.of_bias and ctx.needs_input_grad[1] else None
    return of_x, of_bias, None, None


packed_linear.register_autograd(_backward, setup_context=_setup)
