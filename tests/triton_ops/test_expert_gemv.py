"""Experts that a few tokens chose equal the torch sentence, and compile to what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from aot import Compiler
from torch import Tensor

from triton_ops import reference, selftest
from triton_ops.expert_gemv import columns, expert_gemv, experts, why_not

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
BOUND = {FP16: 4e-4, BF16: 2**-7, FP32: 2e-6}  # rms error; to bf16 the interpreter truncates


@pytest.fixture
def nothing_remembered() -> Iterator[None]:
    selftest.experts_wrong.cache_clear()
    yield
    selftest.experts_wrong.cache_clear()


def mixture(
    t: int, k: int, e: int, d: int, n: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, gate, up, down, index, shares; gate and up are the halves of one tensor."""
    generator = torch.Generator().manual_seed(t * d + n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    gate_up = draw(e, 2 * n, d) / d**0.5
    index = torch.randint(e, (t, k), generator=generator).to(device)
    shares = torch.rand(t, k, generator=generator).to(device)
    return draw(t, d), gate_up[:, :n], gate_up[:, n:], draw(e, d, n), index, shares


def rms(y: Tensor, wanted: Tensor) -> float:
    assert y.shape == wanted.shape and y.dtype == wanted.dtype
    return float((y.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt())


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("t", "k", "e", "d", "n"), [(1, 1, 1, 1, 1), (1, 2, 4, 100, 21), (3, 2, 5, 257, 8), (8, 3, 4, 33, 5)], ids=str
)
def test_equals_the_reference(
    t: int, k: int, e: int, d: int, n: int, dtype: torch.dtype, device: torch.device, poisoned: Callable[..., object]
) -> None:
    given = mixture(t, k, e, d, n, dtype, device)
    with poisoned():
        y = experts(*given)
    assert rms(y, reference.experts(*given)) <= BOUND[dtype]


def test_an_iteration_reads_long_rows_twice_as_far(device: torch.device) -> None:
    assert (columns(1023, 2), columns(1024, 2), columns(511, 4), columns(512, 4)) == (256, 512, 128, 256)
    given = mixture(1, 2, 3, 515, 9, FP32, device)
    assert rms(experts(*given), reference.experts(*given)) <= BOUND[FP32]


def test_an_index_that_is_no_expert_adds_nothing(device: torch.device, poisoned: Callable[..., object]) -> None:
    x, gate, up, down, index, shares = mixture(3, 2, 4, 40, 8, FP32, device)
    index[0, 1], index[1, 0], index[2, 0], index[2, 1] = 4, -1, 2**40, -(2**40)
    with poisoned():
        y = experts(x, gate, up, down, index, shares)
    assert rms(y, reference.experts(x, gate, up, down, index, shares)) <= BOUND[FP32] and (y[2] == 0).all()


def test_experts_that_nobody_chose_are_not_read(device: torch.device) -> None:
    x, gate, up, down, index, shares = mixture(2, 2, 5, 40, 8, FP32, device)
    index.clamp_(max=2)
    wanted = experts(x, gate, up, down, index, shares)
    gate[3:], up[3:], down[3:] = torch.nan, torch.nan, torch.nan
    assert torch.equal(experts(x, gate, up, down, index, shares), wanted)


def test_any_strides(device: torch.device) -> None:
    x, gate, up, down, index, shares = mixture(2, 2, 3, 40, 8, FP32, device)
    wanted = experts(x, gate, up, down, index, shares)
    turned = [tensor.mT.contiguous().mT for tensor in (x, gate, up, down, index, shares)]
    assert torch.equal(experts(*turned), wanted)


def test_the_reference_by_hand() -> None:
    x, down = torch.tensor([[2.0]]), torch.tensor([[[3.0]], [[5.0]]])
    gate, up = torch.tensor([[[1.0]], [[0.0]]]), torch.tensor([[[0.5]], [[1.0]]])
    index, shares = torch.tensor([[0, 1, 2]]), torch.tensor([[0.5, 0.25, 1.0]])
    y = reference.experts(x, gate, up, down, index, shares)  # ½ · 3 · silu(2) · 1, silu(0) = 0, no expert 2
    assert y.item() == pytest.approx(1.5 * 2 / (1 + 2.718281828459045**-2))


def test_is_a_torch_op_with_a_fake(device: torch.device) -> None:
    given = mixture(2, 2, 3, 40, 8, FP32, device)
    torch.library.opcheck(expert_gemv, given, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, gate, up, down, index, shares = mixture(2, 2, 3, 40, 8, FP32, device)
    with pytest.raises(ValueError, match=r"wanted \(T, D\), \(E, N, D\) twice, \(E, D, N\)"):
        experts(x, gate, up, down.mT, index, shares)
    with pytest.raises(ValueError, match=r"wanted \(T, K\) for the 2 tokens of x, at most 8"):
        experts(x, gate, up, down, index, shares[:1])
    with pytest.raises(ValueError, match="at most 8"):
        experts(*mixture(9, 1, 3, 40, 8, FP32, device))
    with pytest.raises(ValueError, match=r"x is torch\.float16, the weights torch\.float32"):
        experts(x.half(), gate, up, down, index, shares)
    assert (
        why_not(torch.float64, torch.device("cuda"))
        == "expert_gemv takes float16, bfloat16 or float32, got torch.float64"
    )
    assert why_not(FP16, torch.device("cpu")) == "expert_gemv needs a CUDA device, got cpu"
    assert why_not(BF16, torch.device("cuda")) is None


def test_no_choices_and_no_width(device: torch.device) -> None:
    x, gate, up, down, index, shares = mixture(2, 2, 3, 40, 8, FP32, device)
    assert (experts(x, gate, up, down, index[:, :0], shares[:, :0]) == 0).all()
    assert experts(*mixture(2, 1, 3, 0, 8, FP32, device)).shape == (2, 0)


@pytest.mark.usefixtures("nothing_remembered")
def test_the_self_test_passes_and_notices_a_kernel_that_errs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        selftest, "EXPERTS", ((2, 40), (4, 6, 40), (4, 6, 40), (4, 40, 6))
    )  # the interpreter takes its time
    assert selftest.experts_wrong(device) is None
    selftest.experts_wrong.cache_clear()
    monkeypatch.setattr("triton_ops.expert_gemv.experts", lambda x, *_: x)
    assert str(selftest.experts_wrong(device)).startswith(f"expert_gemv is wrong on {device}: error ")
    selftest.experts_wrong.cache_clear()
    monkeypatch.setattr("triton_ops.expert_gemv.experts", None)
    assert str(selftest.experts_wrong(device)).startswith(f"expert_gemv fails on {device}: TypeError")


KERNELS = {
    "enter_kernel": ("x gate up index shares h", "width gate_step up_step"),
    "leave_kernel": ("h down index y", "inner width down_step"),
}


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "rows", "wide", "loads"), [("enter_kernel", 4, 4096, 4), ("leave_kernel", 8, 0, 2)])
@pytest.mark.parametrize(
    "dtype", ["bf16", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("fp16", "fp32"))]
)
def test_compiles_to_whole_loads_without_spills(
    cc: int, kernel: str, rows: int, wide: int, loads: int, dtype: str, compiled: Compiler
) -> None:
    pointers, divisible = KERNELS[kernel]
    types = {"index": "*i64", "shares": "*fp32", "h": "*fp32"}
    sizes = ("count", "inner", "width", "k", *(["gate_step", "up_step"] if kernel == "enter_kernel" else ["down_step"]))
    made = compiled(
        kernel=f"triton_ops.expert_gemv:{kernel}",
        signature={name: types.get(name, f"*{dtype}") for name in pointers.split()} | dict.fromkeys(sizes, "i32"),
        constants={"ROWS": rows, "COLUMNS": columns(wide, 4 if dtype == "fp32" else 2)},
        cc=cc,
        divisible=divisible,
    )
    assert made.stack == 0 and made.registers <= 96
    assert made.in_loop(r"LDGSTS\S*\.128") >= loads  # each weight once, 16 bytes a thread, copied ahead
    assert made.in_loop(r"(LDL|STL)\S*") == 0
