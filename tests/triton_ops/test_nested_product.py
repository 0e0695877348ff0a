"""The op for small integers and steps equals its torch sentence, and compiles for GPUs that are not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aot import Compiler
from torch import Tensor

from triton_ops import nested, reference, selftest

BOUND = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 2**-7}  # rms; to bf16 the interpreter cuts off


def weight_of(n: int, k: int, group: int, spread: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """q int8 (N, K) and steps bfloat16."""
    generator = torch.Generator().manual_seed(n * k)
    q = (spread * torch.randn(n, k, generator=generator)).round().clamp(-127, 127).to(torch.int8)
    steps = torch.rand(n, -(-k // group), generator=generator).to(torch.bfloat16)
    return q.to(device), steps.to(device)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "group", "spread"),
    [(1, 1, 1, 1.0), (9, 63, 63, 1.0), (5, 257, 64, 40.0), (3, 600, 256, 2.0), (17, 1500, 1500, 0.8)],
)
def test_it_equals_the_dense_weight(
    n: int, k: int, group: int, spread: float, dtype: torch.dtype, device: torch.device, poisoned: Callable[..., object]
) -> None:
    q, steps = weight_of(n, k, group, spread, device)
    q[n // 2] = 0 if n > 1 else 3
    made = nested.prepare(q, steps, group, dtype)
    weight = reference.nested(q.cpu(), steps.cpu(), group, dtype)
    assert torch.equal(nested.numbers(made), q) and torch.equal(nested.dense(made).cpu(), weight)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype)
    for m in (1, 3, 8):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        with poisoned():
            y = nested.linear(x.to(device), made), nested.linear(x.to(device), made, bias.to(device))
        for found, wanted in zip(y, (reference.linear(x, weight), reference.linear(x, weight, bias)), strict=True):
            assert found.dtype == dtype and found.shape == (m, n)
            gap = (found.cpu().double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9)
            assert gap <= BOUND[dtype]


def test_the_layout_is_that_of_the_reference(device: torch.device) -> None:
    q, steps = weight_of(7, 600, 600, 1.5, device)
    words, escapes, starts = reference.nested_codes(q.cpu())
    made = nested.prepare(q, steps, 600, torch.bfloat16)
    assert torch.equal(made.words.cpu(), words) and torch.equal(made.escapes.cpu()[:-1], escapes)
    assert torch.equal(made.starts.cpu(), starts.to(torch.int32))
    by_hand = torch.tensor([[0, 1, -1, 5, 0, -2]], dtype=torch.int8, device=device)
    small = nested.prepare(by_hand, steps[:1], 6, torch.bfloat16)
    assert int(small.words[0, 0, 0]) == 0b11_00_11_10_01_00 and small.escapes.tolist() == [5, -2, 0]


def test_a_bf16_weight_is_rounded_to_nearest_ties_to_even(device: torch.device) -> None:
    q = torch.tensor([[3]], dtype=torch.int8, device=device)
    for step in (1.0078125, 1.0234375, 1.9921875):  # of 8 bits: three times it has 9 or 10
        steps = torch.tensor([[step]], dtype=torch.bfloat16, device=device)
        x = torch.ones(1, 1, device=device)
        wanted = torch.tensor(3 * step).to(torch.bfloat16).item()
        assert nested.linear(x, nested.prepare(q, steps, 1, torch.bfloat16)).item() == wanted


def test_it_is_a_torch_op_and_says_why_not(device: torch.device) -> None:
    q, steps = weight_of(20, 300, 300, 1.0, device)
    made = nested.prepare(q, steps, 300, torch.float16)
    x = torch.randn(2, 300, device=device).to(torch.float16)
    arguments = (x, made.words, made.escapes, made.starts, made.steps, 300, 2, None)
    torch.library.opcheck(nested.nested_product, arguments, test_utils=("test_schema", "test_faketensor"))
    assert nested.linear(x[:0], made).shape == (0, 20)
    assert nested.why_not((8, 9), torch.float16, torch.device("cuda"), 9) == "nested takes 1 to 8 tokens, got 9"
    with pytest.raises(ValueError, match="M up to 8"):
        nested.linear(x[:1].expand(9, -1), made)
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16, the weight torch\.float16"):
        nested.linear(x.to(torch.bfloat16), made)


def test_a_device_on_which_it_errs_is_noticed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "SHAPE", (20, 516))
    selftest.nested_wrong.cache_clear()
    assert selftest.nested_wrong(device) is None
    right = nested.prepare
    monkeypatch.setattr(nested, "prepare", lambda q, *rest: right(q.roll(1, 1), *rest))
    selftest.nested_wrong.cache_clear()
    assert "nested is wrong on" in str(selftest.nested_wrong(device))
    selftest.nested_wrong.cache_clear()


@pytest.mark.parametrize(
    "cc", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("most", "rows", "registers"), [(1, 2, 96), (8, 1, 168)])
def test_it_compiles_without_spills(cc: int, most: int, rows: int, registers: int, compiled: Compiler) -> None:
    pointers = {"words": "*i32", "escapes": "*i8", "starts": "*i32", "steps": "*bf16", "out": "*fp32"}
    sizes = dict.fromkeys(("n", "k", "m", "chunks", "chunks_each", "group", "groups"), "i32")
    made = compiled(
        kernel="triton_ops.nested:nested_kernel",
        signature=pointers | {"x": "*bf16", "bias": "*bf16"} | sizes,
        constants={"ROWS": rows, "TOKENS": most, "ROUND": 1, "SPLIT": True, "ALIKE": True},
        cc=cc,
        warps=1,
        divisible="n k group",
    )
    assert nested.rows_for(most) == rows
    assert made.stack == 0 and made.registers <= registers
