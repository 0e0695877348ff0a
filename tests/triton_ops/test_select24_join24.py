"""The two portable 2:4 kernels against their reference, in the interpreter or on a GPU, and what the compiler makes of
them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from aot import Compiler

from triton_ops import join24, reference, select24

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
CASES = [(select24, 1, 4, 1), (select24, 63, 100, 1), (select24, 20, 2004, 1), (select24, 24, 512, 1)]
CASES += [(join24, 1, 4, 1), (join24, 63, 100, 3), (join24, 64, 256, 16), (join24, 70, 2004, 17), (join24, 16, 132, 65)]
KERNELS = pytest.mark.parametrize("kernel", [select24, join24], ids=lambda kernel: kernel.NAME)


@DTYPES
@pytest.mark.parametrize("kernel,n,k,m", CASES, ids=lambda one: getattr(one, "NAME", str(one)))
def test_a_product_of_whole_numbers_is_exact(
    whole: Callable,
    poisoned: Callable,
    device: torch.device,
    kernel: ModuleType,
    n: int,
    k: int,
    m: int,
    dtype: torch.dtype,
) -> None:
    x, weight, bias = whole(m, n, k, dtype, device)
    packed = kernel.prepare(weight)
    with poisoned():
        y, plain = kernel.linear(x, packed, bias), kernel.linear(x, packed)
    assert torch.equal(y, reference.linear(x, weight, bias))
    assert torch.equal(plain, reference.linear(x, weight))
    assert torch.equal(kernel.restore(packed), weight)


@DTYPES
@KERNELS
def test_a_product_is_the_reference(
    sparse: Callable, close: Callable, device: torch.device, kernel: ModuleType, dtype: torch.dtype
) -> None:
    weight, m = sparse(40, 1100, dtype, device), kernel.MOST_TOKENS if kernel is select24 else 5
    x = sparse(m, 1100, dtype, device, sparsity=0.0, seed=1)
    close(kernel.linear(x, kernel.prepare(weight)), reference.linear(x, weight))


@KERNELS
def test_where_rows_are_many_a_program_has_all_their_inputs(
    whole: Callable, poisoned: Callable, device: torch.device, kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "WARPS_WANTED", 1)
    x, weight, bias = whole(1, 24, 1100, torch.bfloat16, device)
    packed = kernel.prepare(weight)
    with poisoned():
        y = kernel.linear(x, packed, bias)
    assert torch.equal(y, reference.linear(x, weight, bias))


@KERNELS
def test_x_at_an_odd_address_and_no_tokens(whole: Callable, device: torch.device, kernel: ModuleType) -> None:
    x, weight, _ = whole(1, 20, 64, torch.float16, device)
    packed = kernel.prepare(weight)
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(1, 64)
    assert shifted.data_ptr() % 4 == 2
    assert torch.equal(kernel.linear(shifted, packed), reference.linear(x, weight))
    assert kernel.linear(x[:0], packed).shape == (0, 20)


@pytest.mark.parametrize("kernel", [select24.select24, join24.join24], ids=["select24", "join24"])
def test_the_operator_has_a_shape_on_meta(whole: Callable, kernel: Callable) -> None:
    x, weight, bias = whole(1, 24, 64, torch.bfloat16, torch.device("cpu"))
    pairs, places, *_ = select24.prepare(weight)
    torch.library.opcheck(kernel, (x, pairs, places, bias))
    assert kernel(*(a.to("meta") for a in (x, pairs, places, bias))).shape == (1, 24)


def test_they_say_why_not(whole: Callable, device: torch.device) -> None:
    cuda = torch.device("cuda")
    assert select24.why_not((64, 64), torch.float16, cuda, 2) == "select24 takes one token, got 2"
    assert select24.why_not((64, 64), torch.float16, cuda, 1) is None
    assert join24.why_not((64, 64), torch.bfloat16, cuda, 500) is None
    assert join24.why_not((64, 64), torch.bfloat16, torch.device("cpu"), 1) == "join24 needs a CUDA device, got cpu"
    x, weight, _ = whole(2, 20, 64, torch.float16, device)
    with pytest.raises(ValueError, match=r"select24: x is \(2, 64\), wanted \(M, 64\) with M up to 1"):
        select24.linear(x, select24.prepare(weight))


ROWS = {"x": "*bf16", "pairs": "*i32", "places": "*i32", "bias": "*bf16", "y": "*bf16"}
EVERYWHERE = pytest.mark.parametrize("cc", [90, *(pytest.param(cc, marks=pytest.mark.slow) for cc in (80, 100))])


@EVERYWHERE
def test_select24_compiles_to_wide_loads_and_copied_ahead_in_under_six_instructions_a_weight(
    compiled: Compiler, cc: int
) -> None:
    made = compiled(
        kernel="triton_ops.select24:select24_kernel",
        signature=ROWS | dict.fromkeys(("N", "K", "words", "parts"), "i32"),
        constants={"ROWS": 8, "WORDS": 16, "FINISHED": True, "BIAS": True, "BF16": True},
        cc=cc,
        divisible="N K words",
    )
    assert made.in_loop(r"LDGSTS\S*\.128") == 2  # all pairs: a thread has 32 weights
    assert len(made.loop) / 32 < 6
    assert made.stack == 0 and made.count("LDL|STL") == 0


@EVERYWHERE
@pytest.mark.parametrize("tokens", [16, 64])
def test_join24_compiles_to_a_tensor_core_without_spills(compiled: Compiler, cc: int, tokens: int) -> None:
    made = compiled(
        kernel="triton_ops.join24:join24_kernel",
        signature=ROWS | dict.fromkeys(("M", "N", "K", "words", "parts"), "i32"),
        constants={"ROWS": 64, "TOKENS": tokens, "WORDS": 4, "FINISHED": True, "BIAS": True, "INTERPRETED": False},
        cc=cc,
        divisible="N K words",
    )
    assert made.count(r"HMMA|HGMMA|UTCHMMA") > 0 and made.count(r"LDG\.E\S*\.128|LDGSTS\.E\S*\.128") > 0
    assert made.stack == 0 and made.count("LDL|STL") == 0
