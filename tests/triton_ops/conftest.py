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


def pytest_configure(config: pytest.Config) -> None:
    # the interpreter of Triton 3.6 takes arrays of one element for numbers, which numpy up to 2.3 warns of
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")


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
def close() -> Callable[[Tensor, Tensor], None]:
    """`close(y, wanted)` asserts that y differs by little more than its own rounding: rms(y - wanted) / rms(wanted)."""

    def check(y: Tensor, wanted: Tensor) -> None:
        assert y.shape == wanted.shape and y.dtype == wanted.dtype and y.device == wanted.device
        error = (y.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt()
        # one rounding to bf16 is 0.0017; the interpreter cuts off instead of rounding, which is 0.0043
        bound = {torch.float16: 3e-4, torch.bfloat16: 5e-3 if y.device.type == "cpu" else 2e-3}[y.dtype]
        assert error <= bound

    return check


@pytest.fixture(scope="session")
def whole() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`whole(m, n, k, dtype, device, sparsity=None)` → x (M, K), weight (N, K), bias (N,) of small whole numbers, whose
    products are exact in any order; the weight 2:4 where no sparsity is given."""
    from triton_ops import reference

    def make(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, sparsity: float | None = None):
        generator = torch.Generator().manual_seed(m * n * k)
        x = torch.randint(-1, 2, (m, k), generator=generator).to(dtype)
        weight = torch.randint(-2, 3, (n, k), generator=generator).to(dtype)
        if sparsity is None:
            weight = weight.masked_fill(~reference.mask24(weight + torch.rand(n, k, generator=generator)), 0)
        else:
            weight = weight.masked_fill(torch.rand(n, k, generator=generator) < sparsity, 0)
        bias = torch.randint(-9, 10, (n,), generator=generator).to(dtype)
        assert reference.linear(x, weight, bias).double().abs().max() <= 256  # the last whole number before bf16 skips
        return x.to(device), weight.to(device), bias.to(device)

    return make


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
