"""Weights stacked as one give what each gives alone, in the launches of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aot import Compiler
from torch import Tensor

from triton_ops import reference, selftest, stacked

DENSE = {"bitmask", "sell", "split24"}  # kernels of weights whose zeros are anywhere
ROWS = (20, 7, 33)  # no multiple of a tile
CASES = [(kernel, m) for kernel in stacked.KERNELS for m in (1, 3) if (kernel, m) != ("select24", 3)]


@pytest.fixture
def attention(whole: Callable, device: torch.device) -> Callable[[str, int], tuple[Tensor, list[Tensor], list[Tensor]]]:
    """`attention(kernel, m)` → x (M, 516), three weights of small whole numbers, three biases."""

    def make(kernel: str, m: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        sparsity = 0.6 if kernel in DENSE else None
        x, weight, bias = whole(m, sum(ROWS), 516, torch.bfloat16, device, sparsity=sparsity)
        return x, [part.clone() for part in weight.split(ROWS)], [part.clone() for part in bias.split(ROWS)]

    return make


def test_every_kernel_of_linear_layers_stacks() -> None:
    assert set(stacked.KERNELS) == set(selftest.KERNELS)


@pytest.mark.parametrize("kernel,m", CASES)
def test_each_result_is_that_of_its_weight(attention: Callable, poisoned: Callable, kernel: str, m: int) -> None:
    x, weights, biases = attention(kernel, m)
    made = stacked.prepare(kernel, weights)
    some = [biases[0], None, biases[2]]
    with poisoned():
        plain = stacked.linear(x, made)
        shifted = stacked.linear(x, made, stacked.stack_biases(some, made))
    for got, wanted in (
        (plain, reference.stacked(x, weights, [None] * 3)),
        (shifted, reference.stacked(x, weights, some)),
    ):
        assert len(got) == 3 and all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("kernel", stacked.KERNELS)
def test_weights_come_back_to_the_bit(sparse: Callable, device: torch.device, kernel: str) -> None:
    weights = [sparse(n, 68, torch.float16, device, sparsity=0.7 if kernel in DENSE else None, seed=n) for n in ROWS]
    back = stacked.restore(stacked.prepare(kernel, weights))
    for one, weight in zip(back, weights, strict=True):
        assert torch.equal(one.view(torch.int16), weight.view(torch.int16))


def test_results_are_parts_of_one_tensor_and_for_one_token_contiguous(attention: Callable) -> None:
    x, weights, _ = attention("mma24", 1)
    q, k, v = stacked.linear(x, stacked.prepare("mma24", weights))
    assert k.data_ptr() - q.data_ptr() == 20 * 2 and v.data_ptr() - k.data_ptr() == 7 * 2
    assert all(one.is_contiguous() for one in (q, k, v))


def test_no_bias_at_all_is_none(attention: Callable) -> None:
    made = stacked.prepare("mma24", attention("mma24", 1)[1])
    assert stacked.stack_biases([None, None, None], made) is None
    with pytest.raises(ValueError, match="longer"):
        stacked.stack_biases([torch.zeros(20)], made)


def test_what_does_not_fit_is_refused() -> None:
    weight, cuda = torch.zeros(16, 64, dtype=torch.float16), torch.device("cuda")
    for weights, found in [
        ([weight, weight[:, :32]], r"\(16, 64\) torch.float16, \(16, 32\) torch.float16"),
        ([weight, weight.bfloat16()], r"\(16, 64\) torch.float16, \(16, 64\) torch.bfloat16"),
        ([], "none"),
    ]:
        with pytest.raises(ValueError, match=f"stacked weights share their inputs and dtype, got {found}"):
            stacked.prepare("mma24", weights)
    with pytest.raises(ValueError, match="no kernel 'cublas'; known: mma24, "):
        stacked.prepare("cublas", [weight])
    assert stacked.why_not("sell", [(8, 9), (8, 10)], torch.float16, cuda, 1) == (
        "stacked weights share their inputs, got 8×9, 8×10"
    )
    assert stacked.why_not("sell", [(8, 9), (4, 9)], torch.float16, cuda, 5) == "sell takes 1 to 4 tokens, got 5"
    assert stacked.why_not("sell", [(8, 9), (4, 9)], torch.float16, cuda, 1) is None


@pytest.mark.parametrize(
    "kernel,alone,together",
    [
        ("mma24", ["mma24_kernel", "add_parts_kernel"], ["mma24_kernel"]),
        ("split24", ["mma24_kernel", "add_parts_kernel"], ["mma24_kernel"]),
        ("select24", ["select24_kernel", "add_parts_kernel"], ["select24_kernel"]),
    ],
)
def test_q_k_and_v_of_a_llama_are_one_launch(
    compiled: Compiler, kernel: str, alone: list[str], together: list[str]
) -> None:
    assert compiled.launches(kernel, 1024, 4096, 1) == alone  # k, or v
    assert compiled.launches(kernel, 4096 + 1024 + 1024, 4096, 1) == together
