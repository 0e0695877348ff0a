"""The tests of a kernel run in Triton's interpreter where there is no GPU, and on the GPU where there is one.

tests/conftest.py decides which, before anything imports triton. What a compiler makes of a kernel needs no GPU, but
another process: the fixture `compiled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from aot import Compiler
from torch import Tensor


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def compiled() -> Iterator[Compiler]:
    with Compiler() as compiler:
        yield compiler


@contextmanager
def _poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch.empty then fills floats with NaN, integers with their largest
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def poisoned() -> Callable[..., object]:
    """`with poisoned():` memory that an op leaves unwritten is NaN."""
    return _poisoned


@pytest.fixture(scope="session")
def rms() -> Callable[[Tensor, Tensor], float]:
    """`rms(y, wanted)` = rms(y - wanted) / rms(wanted), in float64; NaN where either holds one."""

    def error(y: Tensor, wanted: Tensor) -> float:
        assert y.shape == wanted.shape and y.dtype == wanted.dtype and y.device == wanted.device
        y, wanted = y.double(), wanted.double()
        return float((y - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())

    return error


@pytest.fixture(scope="session")
def sparse() -> Callable[..., Tensor]:
    """`sparse(n, k, dtype, device, sparsity=None, seed=0)` → weight (N, K): random values; 2:4 where no sparsity is
    given, with some groups of fewer survivors and a -0.0 among the kept."""
    from triton_ops import reference

    def make(n: int, k: int, dtype: torch.dtype, device: torch.device, sparsity: float | None = None, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(n, k, generator=generator).to(dtype)
        if sparsity is None:
            keep = reference.mask24(weight) & (torch.rand(n, k, generator=generator) > 0.1)
        else:
            keep = torch.rand(n, k, generator=generator) > sparsity
        weight = torch.where(keep, weight, torch.zeros((), dtype=dtype))
        first = keep.nonzero()[0]
        weight[first[0], first[1]] = -0.0
        return weight.to(device)

    return make
