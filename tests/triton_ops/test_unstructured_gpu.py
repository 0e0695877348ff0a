"""What only a GPU can show of the unstructured kernels: real shapes, the same bits every run, capture in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from triton_ops import bitmask, reference, sell

pytestmark = pytest.mark.gpu
CASES = [(bitmask, 1), (bitmask, 8), (bitmask, 32), (sell, 1), (sell, 2), (sell, 4)]


@pytest.mark.parametrize(("kernel", "m"), CASES)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (14336, 4096), (4096, 14336), (1000, 2001)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_model_shapes_equal_dense(
    kernel: ModuleType, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, sparse: Callable[..., Tensor]
) -> None:
    weight = sparse(n, k, dtype, device, sparsity=0.7)
    made = kernel.prepare(weight)
    assert torch.equal(kernel.restore(made).view(torch.int16), weight.view(torch.int16))
    x = torch.randn(m, k, device=device, dtype=dtype)
    y, wanted = kernel.linear(x, made), reference.linear(x, weight)
    assert torch.equal(y, kernel.linear(x, made))
    error = (y.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt()
    assert error <= {torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]


@pytest.mark.parametrize(("kernel", "m"), CASES)
def test_runs_in_a_cuda_graph(kernel: ModuleType, m: int, device: torch.device, sparse: Callable[..., Tensor]) -> None:
    made = kernel.prepare(sparse(512, 1024, torch.bfloat16, device, sparsity=0.7))
    x = torch.randn(m, 1024, device=device, dtype=torch.bfloat16)
    kernel.linear(x, made)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.linear(x, made)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, kernel.linear(x, made))
