"""The bitmask kernels equal their torch sentence, and compile to what their docstrings say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from aot import Compiler
from torch import Tensor

from triton_ops import bitmask, reference
from triton_ops.bitmask_decode import popcount
from triton_ops.bitmask_gemm import bitmask_gemm
from triton_ops.bitmask_gemv import bitmask_gemv, chunks_each
from triton_ops.requirements import PTX

BOUND = {
    torch.float32: 1e-6,
    torch.float16: 4e-4,
    torch.bfloat16: 2**-7,
}  # rms error; to bf16 the interpreter truncates
SHAPES = [(1, 1), (9, 63), (70, 100), (5, 257)]
LONG = (17, 1500, torch.float16)
POINTERS = {"words": "*i32", "starts": "*i32", "out": "*fp32"}
SIZES = {"n": "i32", "k": "i32", "chunks": "i32", "chunks_each": "i32"}


def tokens(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


def rms(y: Tensor, wanted: Tensor) -> float:
    """rms(y - wanted) / rms(wanted); NaN where either holds one."""
    assert y.shape == wanted.shape and y.dtype == wanted.dtype
    return float((y.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt())


@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(*shape, dtype) for shape in SHAPES for dtype in BOUND] + [LONG], ids=str
)
def test_equals_dense(
    n: int, k: int, dtype: torch.dtype, device: torch.device, sparse: Callable[..., Tensor],
    poisoned: Callable[..., object],
) -> None:  # fmt: skip
    weight = sparse(n, k, dtype, device, sparsity=0.0 if n == 1 else 0.7)
    weight[n // 2] = 0 if n > 1 else 3  # a row that keeps nothing
    weight[n - 1] = torch.randn(k, generator=torch.Generator().manual_seed(2)).to(weight)  # and one that keeps all
    made = bitmask.prepare(weight)
    bias = tokens(1, n, dtype, device)[0]
    for m in (1, 3, 17):
        x = tokens(m, k, dtype, device)
        with poisoned():
            plain, shifted = bitmask.linear(x, made), bitmask.linear(x, made, bias)
        assert rms(plain, reference.linear(x, weight)) <= BOUND[dtype]
        assert rms(shifted, reference.linear(x, weight, bias)) <= BOUND[dtype]


def test_bits_are_counted(device: torch.device) -> None:
    words = torch.tensor([0, -1, 1, -(2**31), 0x0F0F1234, *range(251)], dtype=torch.int32, device=device)
    counts = torch.zeros_like(words)
    _count[(1,)](words, counts, PTX)
    assert counts.tolist() == [bin(word & 0xFFFFFFFF).count("1") for word in words.tolist()]


@triton.jit
def _count(words, counts, PTX: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(counts + at, popcount(tl.load(words + at), PTX))


@pytest.mark.parametrize("m", [1, 2])
def test_starts_may_be_64_bits_wide(m: int, device: torch.device, sparse: Callable[..., Tensor]) -> None:
    made = bitmask.prepare(sparse(20, 600, torch.float16, device, sparsity=0.5))
    wide = bitmask.BitmaskWeight(made.values, made.words, made.starts.long(), made.shape)
    x = tokens(m, 600, torch.float16, device)
    assert torch.equal(bitmask.linear(x, made), bitmask.linear(x, wide))


@pytest.mark.parametrize("m", [1, 5])
def test_rows_of_x_need_not_be_contiguous(m: int, device: torch.device, sparse: Callable[..., Tensor]) -> None:
    made = bitmask.prepare(sparse(20, 64, torch.float16, device, sparsity=0.5))
    x = tokens(64, m, torch.float16, device)
    assert torch.equal(bitmask.linear(x.T, made), bitmask.linear(x.T.contiguous(), made))


def test_a_weight_without_rows_gives_nothing(device: torch.device) -> None:
    made = bitmask.prepare(torch.zeros(0, 32, dtype=torch.float16, device=device))
    for m in (1, 2):
        assert bitmask.linear(tokens(m, 32, torch.float16, device), made).shape == (m, 0)


def test_no_tokens_give_nothing(device: torch.device) -> None:
    made = bitmask.prepare(torch.ones(3, 32, dtype=torch.float16, device=device))
    assert bitmask.linear(tokens(0, 32, torch.float16, device), made).shape == (0, 3)


def test_k_is_split_where_rows_are_few() -> None:
    assert chunks_each(programs=512, chunks=56) == 28  # 4096 rows of 14336: two parts
    assert chunks_each(programs=1792, chunks=16) == 16
    assert chunks_each(programs=1, chunks=3) == 1


@pytest.mark.parametrize("op", [bitmask_gemv, bitmask_gemm], ids=["gemv", "gemm"])
def test_is_a_torch_op_with_a_fake(op: torch.library.CustomOpDef, device: torch.device, sparse: Callable[..., Tensor]):
    made = bitmask.prepare(sparse(20, 300, torch.float16, device, sparsity=0.5))
    x, bias = tokens(1, 300, torch.float16, device), tokens(1, 20, torch.float16, device)[0]
    for given in (None, bias):
        torch.library.opcheck(
            op,
            (x, made.values, made.words, made.starts, given),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_says_why_not(device: torch.device) -> None:
    gpu = torch.device("cuda")
    assert bitmask.why_not((8, 9), torch.float32, gpu, 32) is None
    assert bitmask.why_not((8, 9), torch.float16, gpu, 33) == "bitmask takes 1 to 32 tokens, got 33"
    assert "takes float16, bfloat16 or float32, got" in str(bitmask.why_not((8, 9), torch.float64, gpu, 1))
    made = bitmask.prepare(torch.ones(2, 8, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match="M up to 32"):
        bitmask.linear(tokens(33, 8, torch.float16, device), made)
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        bitmask.linear(tokens(1, 8, torch.float32, device), made)


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_gemv_compiles_without_spills(cc: int, dtype: str, compiled: Compiler) -> None:
    made = compiled(
        kernel="triton_ops.bitmask_gemv:gemv_kernel",
        signature={"values": f"*{dtype}", "x": f"*{dtype}", "bias": f"*{dtype}"} | POINTERS | SIZES,
        constants={"CHUNK": 256, "ROWS": 8, "SPLIT": True, "PTX": True},
        cc=cc,
        divisible="n k",
    )
    assert made.stack == 0 and made.registers <= 64
    assert made.in_loop("POPC") == 5  # one a word and one a group of four
    assert len(made.loop) <= 17 * 16  # a thread decodes 16 weights


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "tile", "most"), [("bf16", 64, 16), ("bf16", 64, 32), ("fp32", 32, 32)])
def test_gemm_compiles_without_spills(cc: int, dtype: str, tile: int, most: int, compiled: Compiler) -> None:
    made = compiled(
        kernel="triton_ops.bitmask_gemm:gemm_kernel",
        signature={"values": f"*{dtype}", "x": f"*{dtype}", "bias": f"*{dtype}"} | POINTERS | SIZES | {"m": "i32"},
        constants={
            "CHUNK": 256,
            "TILE": tile,
            "ROWS": 64,
            "TOKENS": most,
            "SPLIT": True,
            "INTERPRET": False,
            "PTX": True,
        },
        cc=cc,
        divisible="n k",
    )
    assert made.stack == 0 and made.registers <= 128
    if dtype == "bf16":
        assert made.in_loop(r"HMMA|HGMMA|UTCHMMA") > 0
        assert 8 <= made.in_loop("POPC") <= 9  # none for the first group of a word, where a thread has all eight
        assert len(made.loop) <= 14.5 * 32  # a thread decodes 32 weights
