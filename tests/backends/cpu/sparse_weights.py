"""Weights with zeros."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse(*shape: int, sparsity: float = 0.7, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Random weights with about `sparsity` zeros at random places."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight.masked_fill_(torch.rand(shape, generator=generator) < sparsity, 0).to(dtype)  # 0 · w may be -0.0


def n_of_m(rows: int, columns: int, n: int, m: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random weights that keep the n largest of every m."""
    weight = torch.randn(rows, columns // m, m, generator=torch.Generator().manual_seed(1))
    keep = torch.zeros_like(weight, dtype=torch.bool).scatter_(2, weight.abs().topk(n, dim=2).indices, True)
    return weight.masked_fill_(~keep, 0).view(rows, columns).to(dtype)
