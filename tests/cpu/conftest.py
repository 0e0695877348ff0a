"""Weights to multiply with, and outputs that hold NaN until they are written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmsparse.cpu import why_not

if reason := why_not():
    pytest.skip(f"no CPU kernels here: {reason}", allow_module_level=True)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Whatever `torch.empty` gives is NaN, so that an output that was not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sparse(*shape: int, sparsity: float = 0.7, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Random weights with about `sparsity` zeros at random places."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return (weight * (torch.rand(shape, generator=generator) >= sparsity)).to(dtype)


def n_of_m(rows: int, columns: int, n: int, m: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random weights that keep the n largest of every m."""
    weight = torch.randn(rows, columns // m, m, generator=torch.Generator().manual_seed(1))
    keep = torch.zeros_like(weight, dtype=torch.bool).scatter_(2, weight.abs().topk(n, dim=2).indices, True)
    return (weight * keep).view(rows, columns).to(dtype)
