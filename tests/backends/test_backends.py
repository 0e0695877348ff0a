"""Every backend that can run here multiplies with the weight that it was given, and gives it back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmsparse.backends import BACKENDS, WeightSpec, table
from llmsparse.backends.choice import why_not
from llmsparse.backends.dense import BLOCK, DenseLowMemory
from llmsparse.formats import PackedTensor
from llmsparse.formats.bitmask import Bitmask
from llmsparse.formats.nested import Nested

CPU = torch.device("cpu")
FORMAT = {"nested": "nested"}
HERE = [  # what runs here, and a pattern or format that it takes
    (name, kind)
    for name in BACKENDS
    for kind in ("unstructured", "2:4", "nested")
    if not why_not(name, WeightSpec((8, 16), kind, 64, torch.bfloat16, CPU, format=FORMAT.get(kind, "bitmask")))
]
GPU_ONLY = ["mma24", "split24", "select24", "bitmask", "sell", "nested", "cusparselt"]


def packed_weight(pattern: str, *lead: int) -> PackedTensor:
    """(…, 24, 40), with a kept zero and a -0.0 in it, or small integers."""
    generator = torch.Generator().manual_seed(0)
    if pattern == "nested":
        q = torch.randn(*lead, 24, 40, generator=generator).mul(1.5).round().to(torch.int8)
        return Nested.encode(q, torch.rand(q.numel() // 40, 1, generator=generator).to(torch.bfloat16), torch.bfloat16)
    weight = torch.randn(*lead, 24, 40, generator=generator).to(torch.bfloat16)
    keep = torch.rand(weight.shape, generator=generator) > 0.7
    if pattern != "unstructured":
        keep = torch.tensor([1, 0, 1, 0]).bool().repeat(*lead, 24, 10)
    weight.masked_fill_(~keep, 0.0)
    kept = keep.view(-1).nonzero().flatten()
    weight.view(-1)[kept[0]], weight.view(-1)[kept[1]] = 0.0, -0.0
    return Bitmask.pack(weight, pattern, keep)


def test_cpu_backends_run_here() -> None:
    assert {(name, kind) for name in ("dense", "dense-lowmem") for kind in ("unstructured", "nested")} <= set(HERE)
    assert ("cpu-bitmask", "nested") not in HERE and ("cpu-nested", "2:4") not in HERE


def test_what_rounds_its_input_runs_only_where_it_is_asked_for() -> None:
    rounding = {name for name, backend in BACKENDS.items() if not backend.exact}
    assert rounding == {"cpu-nested-int8"} and not rounding & {row.backend for row in table.shipped()}


@pytest.mark.parametrize(("name", "pattern"), HERE)
def test_a_weight_comes_back_as_it_was(name: str, pattern: str) -> None:
    backend, packed = BACKENDS[name], packed_weight(pattern)
    prepared = backend.prepare(packed, WeightSpec.of(packed))
    for end, tensor in backend.restore(prepared).tensors().items():
        assert tensor.dtype == packed.tensors()[end].dtype
        assert torch.equal(tensor.view(torch.uint8), packed.tensors()[end].view(torch.uint8)), end
    assert torch.equal(backend.dense(prepared).view(torch.int16), packed.unpack().view(torch.int16))


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "pattern"), HERE)
def test_products_are_those_of_the_dense_weight(name: str, pattern: str, bias: bool, lead: tuple[int, ...]) -> None:
    backend, packed = BACKENDS[name], packed_weight(pattern)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*lead, 40, generator=generator).to(torch.bfloat16)
    b = torch.randn(24, generator=generator).to(torch.bfloat16) if bias else None
    y = backend.run(backend.prepare(packed, WeightSpec.of(packed)), x, b)
    exact = x.double() @ packed.unpack().double().T + (0.0 if b is None else b.double())
    assert y.shape == (*lead, 24) and y.dtype == torch.bfloat16
    atol = 2**-7 if backend.exact else 2**-3
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=atol)  # bfloat16 rounds to 2⁻⁹


def test_low_memory_products_of_many_blocks_are_those_of_one() -> None:
    rows, width = 48, BLOCK // 16  # three blocks of 16 rows
    weight = torch.zeros(rows, width).to(torch.bfloat16)
    weight[:, ::4096] = torch.arange(1, rows + 1)[:, None].to(torch.bfloat16)
    packed = Bitmask.pack(weight)
    y = DenseLowMemory().run(
        DenseLowMemory().prepare(packed, WeightSpec.of(packed)), torch.ones(2, width).to(torch.bfloat16), None
    )
    assert y.tolist() == (weight.sum(1)[None].expand(2, -1)).tolist()


@pytest.mark.parametrize("name", GPU_ONLY)
def test_gpu_backends_refuse_a_cpu_in_a_line(name: str) -> None:
    reason = BACKENDS[name].why_not(WeightSpec((64, 64), "2:4", 2048, torch.bfloat16, CPU))
    assert reason == "needs an NVIDIA GPU; the device is cpu"


def test_the_cpu_kernel_refuses_half_precision_that_it_lacks() -> None:
    reason = BACKENDS["cpu-bitmask"].why_not(WeightSpec((64, 64), "2:4", 2048, torch.float16, CPU))
    assert reason == "for float32 and bfloat16, this weight is float16"


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("mma24", "2:4"),
        ("select24", "2:4"),
        ("split24", "unstructured"),
        ("split24", "2:4"),
        ("bitmask", "unstructured"),
        ("sell", "unstructured"),
        ("nested", "nested"),
    ],
)
def test_what_a_gpu_kernel_is_given_comes_back_as_it_was(name: str, pattern: str) -> None:
    backend, packed = BACKENDS[name], packed_weight(pattern)
    prepared = backend.prepare(packed, WeightSpec.of(packed))  # packing is plain torch, on any device
    for end, tensor in backend.restore(prepared).tensors().items():
        assert torch.equal(tensor.view(torch.uint8), packed.tensors()[end].view(torch.uint8)), end


class NeverReadBack(TorchDispatchMode):
    """On a GPU a number that is read out of a tensor makes the program wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("block", [1, 40, 2**22])
def test_dense_lowmem_multiplies_in_blocks_and_reads_nothing_back(
    pattern: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsparse.backends.dense.BLOCK", block)
    weight = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    weight = weight.masked_fill(torch.arange(16).remainder(4) < 2, 0.0)
    packed = Bitmask.pack(weight, pattern)
    backend = BACKENDS["dense-lowmem"]
    prepared = backend.prepare(packed, WeightSpec.of(packed))
    assert len(prepared.blocks) == {1: 7, 40: 4, 2**22: 1}[block]
    x, bias = torch.randn(3, 16), torch.randn(7)
    with NeverReadBack():
        y = backend.run(prepared, x, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    assert backend.restore(prepared) is packed and torch.equal(backend.dense(prepared), weight)
