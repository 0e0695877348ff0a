"""One pool of threads, an even share for each, and the same result from any number of them."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from sparse_weights import sparse

from llmsparse.backends.cpu import expand, kernels, matvec, matvecs, prepare
from llmsparse.backends.cpu.library import library
from llmsparse.formats.bitmask import Bitmask

BF16, FP32 = torch.bfloat16, torch.float32

ONE_POOL = """
import os, re, sys
import torch
from llmsparse.backends.cpu import expand, matvec, prepare
from llmsparse.formats.bitmask import Bitmask

def threads(): return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
weight = torch.eye(400, 64, dtype=torch.bfloat16)  # too small for torch to start its threads
before = threads()
held = prepare(Bitmask.pack(weight))
matvec(held, torch.ones(1, 64, dtype=torch.bfloat16))
ours = threads()
torch.ones(1 << 22).exp()
both = threads()
maps = open("/proc/self/maps").read()
runtimes = set(re.findall(r"(/.*/lib(?:gomp|omp|iomp5)[^/\\n]*)$", maps, re.M))
print(ours - before, both - before, len(runtimes))
"""


@pytest.mark.parametrize(("dtype", "x_dtype"), [(BF16, BF16), (BF16, FP32), (FP32, FP32)])
def test_the_result_does_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, x_dtype: torch.dtype, threads: None
) -> None:
    weight, x = sparse(67, 200, dtype=dtype), torch.randn(3, 200).to(x_dtype)
    packed = Bitmask.pack(weight)
    torch.set_num_threads(1)
    wanted = {name: matvec(prepare(packed), x, kernel=name) for name in kernels(dtype, x_dtype)}
    for number in (2, 3, 5, 40):  # 67 rows are 17 tiles
        torch.set_num_threads(number)
        held = prepare(packed)
        for name, y in wanted.items():
            assert torch.equal(matvec(held, x, kernel=name), y), (name, number)
        assert torch.equal(expand(held, torch.empty_like(weight)), weight)
        assert torch.equal(held.packed().values, packed.values) and torch.equal(held.packed().mask, packed.mask)


def test_threads_are_torchs_own() -> None:
    done = subprocess.run([sys.executable, "-c", ONE_POOL], capture_output=True, text=True, check=True)
    ours, both, runtimes = map(int, done.stdout.split())
    assert (ours, both, runtimes) == (2, 2, 1)  # two beside the main one, which torch then uses


@pytest.mark.parametrize("number", [1, 2, 3, 7, 64])
def test_shares_cost_the_same_wherever_the_values_are(number: int) -> None:
    weight = sparse(400, 256)
    weight[100:300] = 0  # values at both ends
    held = prepare(Bitmask.pack(weight))
    pointers = (ctypes.c_void_p * 1)(held.address)
    firsts = [library().first_tile(pointers, 1, 0, rank, number) for rank in range(number + 1)]
    assert firsts[0] == 0 and firsts[-1] == 100 and firsts == sorted(firsts)
    cost = held.starts.diff() + 8 * 4 * 12  # of a tile: its values, and 12 for each of its 8 · 4 mask words
    shares = [int(cost[first:last].sum()) for first, last in pairwise(firsts)]
    assert max(shares) - min(shares) <= 2 * int(cost.max())


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_shares_of_several_weights_follow_each_other_and_cost_the_same_together(number: int) -> None:
    held = [prepare(Bitmask.pack(sparse(out, 256, seed=out))) for out in (400, 4, 100)]
    pointers = (ctypes.c_void_p * 3)(*(one.address for one in held))
    firsts = [
        [library().first_tile(pointers, 3, which, rank, number) for rank in range(number + 1)] for which in range(3)
    ]
    costs = [one.starts.diff() + 8 * 4 * 12 for one in held]
    assert [ends[0] for ends in firsts] == [0, 0, 0] and [ends[-1] for ends in firsts] == [100, 1, 25]
    shares = [
        sum(int(cost[ends[rank] : ends[rank + 1]].sum()) for cost, ends in zip(costs, firsts, strict=True))
        for rank in range(number)
    ]
    assert max(shares) - min(shares) <= 2 * max(int(cost.max()) for cost in costs)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_several_weights_at_once_give_what_each_gives_alone(number: int, threads: None) -> None:
    torch.set_num_threads(number)
    held = [prepare(Bitmask.pack(sparse(out, 200, seed=out))) for out in (67, 3, 32)]
    biases = [torch.randn(67).bfloat16(), None, torch.randn(32)]
    for x in (torch.randn(1, 200).bfloat16(), torch.randn(2, 3, 200).bfloat16()):
        wanted = [matvec(one, x, bias) for one, bias in zip(held, biases, strict=True)]
        for y, alone in zip(matvecs(held, x, biases), wanted, strict=True):
            assert y.is_contiguous() and torch.equal(y, alone)


def test_weights_of_other_inputs_are_refused() -> None:
    held = [prepare(Bitmask.pack(sparse(8, width))) for width in (64, 96)]
    with pytest.raises(ValueError, match=r"\[8, 96\] beside torch.bfloat16 \[8, 64\]"):
        matvecs(held, torch.ones(1, 64, dtype=BF16), [None, None])
