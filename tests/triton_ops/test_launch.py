"""Every launch compiles for the arguments that it is given. Triton makes a variant for each: of an integer that is 1, of one
that is a multiple of 16, of an address that is aligned. So this is all of a call but the run."""

from __future__ import annotations

import pytest
from aot import Compiler

FEW, MANY = 20, 2048 * 16  # rows: shared by several programs, or not
CASES = [
    ("mma24", FEW, 4096, 1, ["mma24_kernel", "add_parts_kernel"]),
    ("mma24", 16, 256, 12, ["pack_x_kernel", "mma24_kernel"]),
    ("select24", FEW, 1028, 1, ["select24_kernel", "add_parts_kernel"]),
    ("join24", FEW, 1028, 1, ["join24_kernel", "add_parts_kernel"]),
    ("split24", FEW, 256, 1, ["mma24_kernel"]),
    ("split24", FEW, 4096, 1, ["mma24_kernel", "add_parts_kernel"]),
    ("bitmask", FEW, 600, 1, ["gemv_kernel", "add_parts_kernel"]),
    ("bitmask", FEW, 600, 5, ["gemm_kernel", "add_parts_kernel"]),
    ("sell", FEW, 600, 1, ["gemv_kernel", "add_parts_kernel"]),
    ("sell", FEW, 200, 3, ["gemv_kernel"]),
]
MORE = [
    ("mma24", MANY, 4, 1, ["mma24_kernel"]),
    ("bitmask", FEW, 1, 1, ["gemv_kernel"]),
    ("bitmask", FEW, 4096, 32, ["gemm_kernel", "add_parts_kernel"]),
    ("sell", FEW, 1, 1, ["gemv_kernel"]),
    ("sell", FEW, 4096, 2, ["gemv_kernel", "add_parts_kernel"]),
    ("mma24", FEW, 4096, 8, ["mma24_kernel", "add_parts_kernel"]),
    ("mma24", FEW, 4096, 32, ["pack_x_kernel", "mma24_kernel", "add_parts_kernel"]),
    ("select24", MANY, 4, 1, ["select24_kernel"]),
    ("join24", MANY, 4, 65, ["join24_kernel"]),
    ("split24", FEW, 4096, 3, ["mma24_kernel", "turn_kernel", "add_residual_kernel"]),
    ("split24", MANY, 4, 32, ["pack_x_kernel", "mma24_kernel", "turn_kernel", "add_residual_kernel"]),
]


@pytest.mark.parametrize("op,n,k,m,kernels", CASES)
def test_a_call_compiles_what_it_launches(
    compiled: Compiler, op: str, n: int, k: int, m: int, kernels: list[str]
) -> None:
    assert compiled.launches(op, n, k, m) == kernels


@pytest.mark.slow
@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("op,n,k,m,kernels", [*CASES, *MORE])
def test_so_does_any_other(compiled: Compiler, op: str, n: int, k: int, m: int, kernels: list[str], cc: int) -> None:
    assert compiled.launches(op, n, k, m, cc) == kernels
