"""Weights of the same inputs as one: q, k and v of an attention, or gate and up of an FFN, in one call of a kernel.

Stacked along their rows when they are packed, several weights are one to any kernel, and its rows are told apart again in
the result, which costs nothing. Decoding gains by it: x is put in order once, two launches of three are saved, and what
is left has rows enough to fill a GPU. k and v of a Llama-3-8B, 1024 × 4096 each, are too few rows for that alone, so that
their inputs are shared by programs whose sums take a second launch; with q they are 6144 rows, and one launch in all.

Each weight's result equals what it gives alone but for the order of its sums: how a product is cut follows from the shape.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

KERNELS = ("mma24", "select24", "join24", "split24", "bitmask", "sell")


class Stacked(NamedTuple):
    """Weights (N_i, K), packed as one (ΣN_i, K)."""

    kernel: str
    packed: Any  # as `prepare` of the kernel's module gives it
    rows: tuple[int, ...]  # N_i


def why_not(
    kernel: str, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device, m: int
) -> str | None:
    """Why weights of these shapes (N_i, K) cannot be stacked for M tokens here, or None."""
    if len({k for _, k in shapes}) != 1:
        return f"stacked weights share their inputs, got {', '.join(f'{n}×{k}' for n, k in shapes) or 'none'}"
    return module_of(kernel).why_not((sum(n for n, _ in shapes), shapes[0][1]), dtype, device, m)


def prepare(kernel: str, weights: Sequence[Tensor]) -> Stacked:
    """Pack weights (N_i, K), dense with zeros, by the kernel of this name, on their device. ValueError where their inputs
    differ in number, or their dtypes; and as the kernel's own `prepare`."""
    kinds = {(weight.shape[1], weight.dtype) for weight in weights}
    if len(kinds) != 1:
        found = ", ".join(f"{tuple(weight.shape)} {weight.dtype}" for weight in weights)
        raise ValueError(f"stacked weights share their inputs and dtype, got {found or 'none'}")
    return Stacked(kernel, module_of(kernel).prepare(torch.cat(list(weights))), tuple(map(len, weights)))


def restore(stacked: Stacked) -> tuple[Tensor, ...]:
    """The weights that `prepare` was given, to the bit."""
    return module_of(stacked.kernel).restore(stacked.packed).split(stacked.rows)


def stack_biases(biases: Sequence[Tensor | None], stacked: Stacked) -> Tensor | None:
    """Biases (N_i,) or None → (ΣN_i,), or None where there is none: to be made once, when weights are packed."""
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    pairs = zip(biases, stacked.rows, strict=True)
    return torch.cat([some.new_zeros(rows) if bias is None else bias for bias, rows in pairs])


def linear(x: Tensor, stacked: Stacked, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """x (M, K), bias (ΣN_i,) → (M, N_i) each, in x's dtype: columns of one tensor, and for one token contiguous. Errors,
    launches and memory are those of the kernel for one weight."""
    return module_of(stacked.kernel).linear(x, stacked.packed, bias).split(stacked.rows, dim=1)


def module_of(kernel: str) -> ModuleType:
    if kernel not in KERNELS:
        raise ValueError(f"no kernel {kernel!r}; known: {', '.join(KERNELS)}")
    return import_module(f"triton_ops.{kernel}")
