"""What only a GPU can show: real shapes, CUDA graphs, no waiting for the host, the order of the instruction's metadata.

Run with `make test-gpu`. The other tests of this folder run on the GPU too where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from triton_ops import expert_gemv, mma24, reference, selftest, stacked
from triton_ops.pack24 import pack24, pack_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # said once, by set_sync_debug_mode itself
]
CUDA = torch.device("cuda")
KERNELS = {name: import_module(f"triton_ops.{name}") for name in selftest.KERNELS}
CASES = pytest.mark.parametrize("name,m", [(name, m) for name, tokens in selftest.KERNELS.items() for m in tokens])


def problem(name: str, n: int, k: int, m: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(CUDA).manual_seed(0)
    weight = torch.randn(n, k, generator=generator, device=CUDA).to(dtype)
    scattered = torch.rand(n, k, generator=generator, device=CUDA) > 0.7
    keep = scattered if name in selftest.UNSTRUCTURED else reference.mask24(weight)
    x = torch.randn(m, k, generator=generator, device=CUDA).to(dtype)
    return x, weight.masked_fill(~keep, 0), torch.randn(n, generator=generator, device=CUDA).to(dtype)


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device. Whatever happens, the tests that follow may wait again."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def needs(kernel: ModuleType, n: int, k: int, m: int) -> None:
    reason = kernel.why_not((n, k), torch.bfloat16, CUDA, m)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("name", KERNELS)
def test_the_self_test_passes(name: str) -> None:
    needs(KERNELS[name], 16, 256, 1)
    assert selftest.wrong(name, CUDA) is None


def test_the_metadata_stands_in_this_order_and_in_no_other() -> None:
    needs(mma24, 16, 256, 1)
    x, weight, _ = problem("mma24", 64, 512, 8)
    packed, wanted = mma24.prepare(weight), reference.linear(x, weight)
    turned = packed._replace(meta=packed.meta[:, :, torch.arange(32, device=CUDA) ^ 2].contiguous())
    assert (mma24.linear(x, packed) - wanted).norm() < 0.01 * wanted.norm()
    assert (mma24.linear(x, turned) - wanted).norm() > 0.1 * wanted.norm()


@CASES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n,k", [(4096, 14336), (1024, 4096), (5632, 2048), (2048, 5632)])
def test_the_error_is_that_of_dense(name: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    needs(KERNELS[name], n, k, m)
    x, weight, bias = problem(name, n, k, m, dtype)
    exact = x.double() @ weight.double().T + bias.double()
    dense = (torch.nn.functional.linear(x, weight, bias).double() - exact).norm()
    ours = (KERNELS[name].linear(x, KERNELS[name].prepare(weight), bias).double() - exact).norm()
    assert ours <= 1.2 * dense


@CASES
def test_a_graph_replays_to_the_bit_and_nothing_waits_for_the_host(name: str, m: int) -> None:
    kernel = KERNELS[name]
    needs(kernel, 1024, 4096, m)
    x, weight, bias = problem(name, 1024, 4096, m)
    packed = kernel.prepare(weight)
    wanted = kernel.linear(x, packed, bias)
    with no_waiting():
        again = kernel.linear(x, packed, bias)
    assert torch.equal(again, wanted)
    graph, other = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y = kernel.linear(other, packed, bias)
    other.copy_(x.flip(1))
    graph.replay()
    assert torch.equal(y, kernel.linear(x.flip(1), packed, bias))
    other.copy_(x)
    graph.replay()
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("pack", [pack24, pack_rows])
def test_packing_on_the_device_is_packing_on_the_host(pack: Callable[[Tensor], tuple]) -> None:
    _, weight, _ = problem("mma24", 1000, 4100, 1)
    here, there = pack(weight), pack(weight.cpu())
    assert torch.equal(here[0].cpu(), there[0]) and torch.equal(here[1].cpu(), there[1])


@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_as_part_of_a_model(name: str) -> None:
    kernel = KERNELS[name]
    needs(kernel, 256, 512, 1)
    x, weight, bias = problem(name, 256, 512, 1)
    packed = kernel.prepare(weight)
    compiled = torch.compile(lambda x: kernel.linear(x, packed, bias).relu(), fullgraph=True)
    assert torch.equal(compiled(x), kernel.linear(x, packed, bias).relu())


@pytest.mark.parametrize("name", stacked.KERNELS)
def test_q_k_and_v_in_one_call_go_into_a_graph(name: str) -> None:
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096)]
    reason = stacked.why_not(name, shapes, torch.bfloat16, CUDA, 1)
    if reason:
        pytest.skip(reason)
    x, weight, _ = problem(name, 6144, 4096, 1)
    weights = weight.split([n for n, _ in shapes])
    packed = stacked.prepare(name, weights)
    with no_waiting():
        found = stacked.linear(x, packed)
    for one, part in zip(found, weights, strict=True):
        exact = x.double() @ part.double().T
        dense = (torch.nn.functional.linear(x, part).double() - exact).norm()
        assert (one.double() - exact).norm() <= 1.2 * dense
    graph, other = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        again = stacked.linear(other, packed)
    other.copy_(x)
    graph.replay()
    assert all(map(torch.equal, again, found))


def mixture(t: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, gate, up, down, index, shares of 16 experts of a Llama-3-8B's FFN, 4 of which a token chooses."""
    generator = torch.Generator(CUDA).manual_seed(0)
    x = torch.randn(t, 4096, generator=generator, device=CUDA).to(dtype)
    gate_up = (torch.randn(16, 1792, 4096, generator=generator, device=CUDA) / 64).to(dtype)
    down = (torch.randn(16, 4096, 896, generator=generator, device=CUDA) / 30).to(dtype)
    index = torch.stack([torch.randperm(16, generator=generator, device=CUDA)[:4] for _ in range(t)])
    return x, gate_up[:, :896], gate_up[:, 896:], down, index, torch.rand(t, 4, generator=generator, device=CUDA)


def test_the_self_test_of_experts_passes() -> None:
    assert selftest.experts_wrong(CUDA) is None


@pytest.mark.parametrize("t", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_error_of_experts_is_that_of_torch(t: int, dtype: torch.dtype) -> None:
    given = mixture(t, dtype)
    exact = reference.experts(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in given))
    x, gate, up, down, index, shares = given
    torchs = torch.zeros_like(x, dtype=torch.float32)
    for row, k in ((row, k) for row in range(t) for k in range(4)):
        e = index[row, k]
        inner = torch.nn.functional.silu(gate[e] @ x[row]) * (up[e] @ x[row])
        torchs[row] += shares[row, k] * (down[e] @ inner)
    ours = (expert_gemv.experts(*given).double() - exact).norm()
    assert ours <= 1.2 * (torchs.to(dtype).double() - exact).norm()


@pytest.mark.parametrize("t", [1, 8])
def test_a_graph_of_experts_follows_other_choices(t: int) -> None:
    x, gate, up, down, index, shares = mixture(t, torch.bfloat16)
    wanted = expert_gemv.experts(x, gate, up, down, index, shares)
    with no_waiting():
        again = expert_gemv.experts(x, gate, up, down, index, shares)
    assert torch.equal(again, wanted)
    graph, other = torch.cuda.CUDAGraph(), index.clone()
    with torch.cuda.graph(graph):
        y = expert_gemv.experts(x, gate, up, down, other, shares)
    other.copy_((index + 1) % 16)
    graph.replay()
    assert torch.equal(y, expert_gemv.experts(x, gate, up, down, (index + 1) % 16, shares))
    other.copy_(index)
    graph.replay()
    assert torch.equal(y, wanted)
