"""The sell layout holds every bit of a weight, its kernel equals the torch sentence, and compiles to what is said of it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from aot import Compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from triton_ops import reference, sell, sell_layout
from triton_ops.sell_gemv import plan, sell_gemv, side_by_side

BOUND = {torch.float16: 4e-4, torch.bfloat16: 2**-7}  # rms error; to bf16 the interpreter truncates


def rms(y: Tensor, wanted: Tensor) -> float:
    """rms(y - wanted) / rms(wanted); NaN where either holds one."""
    assert y.shape == wanted.shape and y.dtype == wanted.dtype
    return float((y.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt())


def tokens(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


def test_gaps_by_hand() -> None:
    assert reference.gaps([0, 1, 16, 47]) == [(0, True), (1, True), (15, True), (15, False), (15, False), (1, True)]
    assert reference.gaps([16]) == [(15, False), (1, True)]


def entries(made: sell.SellWeight, thread: int, part: int) -> tuple[int, list[tuple[int, float]]]:
    """Row of a thread of a segment, and its list of (gap, value), padding too."""
    count = len(made.order) // sell_layout.ROWS // -(-made.shape[1] // made.segment)
    piece = part * count + thread // sell_layout.ROWS
    lane = thread % sell_layout.ROWS
    begin, end = made.slices[piece : piece + 2].tolist()
    words = made.gaps[begin:end, lane].tolist()
    codes = [(word >> 4 * place) & 15 for word in words for place in range(8)]
    row = int(made.order[piece * sell_layout.ROWS + lane])
    return row, list(zip(codes, made.values[begin:end, lane].flatten().tolist(), strict=True))


def test_threads_hold_the_rows_that_the_reference_writes(sparse: Callable[..., Tensor]) -> None:
    weight = sparse(150, 300, torch.float16, torch.device("cpu"), sparsity=0.9)
    made = sell.prepare(weight)
    assert made.segment == 256
    for part in range(2):
        columns = weight[:, 256 * part : 256 * (part + 1)]
        lengths, rows = [], []
        for thread in range(256):
            row, held = entries(made, thread, part)
            kept = reference.stored(columns[row]).nonzero().flatten().tolist() if row < 150 else []
            wanted, values = reference.gaps(kept), iter(kept)
            assert held[: len(wanted)] == [
                (gap, float(columns[row, next(values)]) if real else 0) for gap, real in wanted
            ]
            assert not any(gap or value for gap, value in held[len(wanted) :])
            lengths.append(len(wanted))
            rows.append(row)
        assert lengths == sorted(lengths, reverse=True) and sorted(rows) == [*range(150), *[150] * 106]


@settings(max_examples=30)
@given(
    n=st.integers(0, 140),
    k=st.integers(0, 600),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
    seed=st.integers(0, 99),
)
def test_round_trip_keeps_every_bit(n: int, k: int, dtype: torch.dtype, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    weight = torch.where(torch.rand(n, k, generator=generator) < sparsity, torch.zeros((), dtype=dtype), weight)
    if weight.numel():
        weight.view(-1)[seed % weight.numel()] = -0.0
        weight.view(-1)[0] = torch.nan
    made = sell.prepare(weight)
    assert torch.equal(sell.restore(made).view(torch.int16), weight.view(torch.int16))


def test_neutral_form_gives_the_same(sparse: Callable[..., Tensor]) -> None:
    weight = sparse(20, 70, torch.bfloat16, torch.device("cpu"), sparsity=0.7)
    keep = reference.stored(weight)
    mask = torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))
    made, wanted = sell.from_neutral(weight[keep], mask, None, (20, 70)), sell.prepare(weight)
    assert torch.equal(made.gaps, wanted.gaps) and torch.equal(made.values, wanted.values)


def test_segments_are_long_where_rows_are_many() -> None:
    assert sell_layout.segment_for(28672, 8192) == 2048
    assert sell_layout.segment_for(14336, 4096) == 512
    assert sell_layout.segment_for(1024, 4096) == 256


def test_padding_is_small(sparse: Callable[..., Tensor]) -> None:
    weight = sparse(1024, 2048, torch.bfloat16, torch.device("cpu"), sparsity=0.7)
    made = sell.prepare(weight)
    assert made.values.numel() <= 1.09 * reference.stored(weight).sum()
    assert 8 * made.nbytes / weight.numel() <= 6.7


@pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [(1, 1, torch.float16), (7, 63, torch.float16), (133, 100, torch.bfloat16), (5, 257, torch.float16)],
    ids=str,
)
def test_equals_dense(
    n: int, k: int, dtype: torch.dtype, device: torch.device, sparse: Callable[..., Tensor],
    poisoned: Callable[..., object],
) -> None:  # fmt: skip
    weight = sparse(n, k, dtype, device, sparsity=0.0 if n == 1 else 0.7)
    weight[n // 2] = 0 if n > 1 else 3  # a row that keeps nothing
    weight[n - 1] = tokens(1, k, dtype, device)  # and one that keeps all
    made = sell.prepare(weight)
    bias = tokens(1, n, dtype, device)[0]
    for m in (1, 2, 3, 4):
        x = tokens(m, k, dtype, device)
        with poisoned():
            plain, shifted = sell.linear(x, made), sell.linear(x, made, bias)
        assert rms(plain, reference.linear(x, weight)) <= BOUND[dtype]
        assert rms(shifted, reference.linear(x, weight, bias)) <= BOUND[dtype]


def test_bridges_cross_wide_gaps(device: torch.device) -> None:
    weight = torch.zeros(2, 700, dtype=torch.float16, device=device)
    weight[0, [0, 255, 256, 699]] = 1.0
    x = torch.arange(700, dtype=torch.float16, device=device)[None]
    assert sell.linear(x, sell.prepare(weight)).tolist() == [[255 + 256 + 699, 0]]


def test_tokens_lie_side_by_side() -> None:
    x = torch.arange(6, dtype=torch.float16).view(3, 2)
    assert side_by_side(x).view(torch.float16).view(2, 4).tolist() == [[0, 2, 4, 0], [1, 3, 5, 0]]
    assert side_by_side(x[:2]).view(torch.float16).view(2, 2).tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize("m", [1, 4])
def test_is_a_torch_op_with_a_fake(m: int, device: torch.device, sparse: Callable[..., Tensor]) -> None:
    made = sell.prepare(sparse(20, 300, torch.float16, device, sparsity=0.5))
    bias = tokens(1, 20, torch.float16, device)[0]
    given = (tokens(m, 300, torch.float16, device), made.values, made.gaps, made.slices, made.order, 20, made.segment)
    torch.library.opcheck(sell_gemv, (*given, bias), test_utils=("test_schema", "test_faketensor"))


def test_says_why_not(device: torch.device) -> None:
    gpu = torch.device("cuda")
    assert sell.why_not((8, 9), torch.bfloat16, gpu, 4) is None
    assert sell.why_not((8, 9), torch.bfloat16, gpu, 5) == "sell takes 1 to 4 tokens, got 5"
    assert sell.why_not((8, 9), torch.float32, gpu, 1) == "sell takes float16 or bfloat16, got torch.float32"
    made = sell.prepare(torch.ones(2, 8, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match="M up to 4"):
        sell.linear(tokens(5, 8, torch.float16, device), made)


def test_nothing_gives_nothing(device: torch.device) -> None:
    empty = sell.prepare(torch.ones(0, 32, dtype=torch.float16, device=device))
    made = sell.prepare(torch.ones(3, 32, dtype=torch.float16, device=device))
    assert sell.linear(tokens(2, 32, torch.float16, device), empty).shape == (2, 0)
    assert sell.linear(tokens(0, 32, torch.float16, device), made).shape == (0, 3)


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize(("m", "word", "most"), [(1, "*i16", 11), (2, "*i32", 13), (4, "*i64", 18)])
def test_compiles_to_whole_loads_without_spills(cc: int, m: int, word: str, most: int, compiled: Compiler) -> None:
    chosen = plan(m)
    made = compiled(
        kernel="triton_ops.sell_gemv:gemv_kernel",
        signature={"values": "*i32", "gaps": "*i32", "slices": "*i32", "order": "*i32", "x": word, "bias": "*bf16",
                   "out": "*fp32", "m": "i32", "n": "i32", "segment": "i32", "count": "i32"},
        constants={"ROWS": 128, "STEP": 8, "BF16": True, "SPLIT": True} | chosen,
        cc=cc,
        divisible="n segment",
    )  # fmt: skip
    assert made.stack == 0 and made.registers <= 56
    # the values of a step are one load of 16 bytes, through shared memory where copied ahead
    steps, ahead = chosen["UNROLL"], chosen["STAGES"] > 1
    assert made.in_loop(r"LDGSTS\S*\.128" if ahead else r"LDG\.E\S*\.128") == steps
    assert made.in_loop(r"LDG\.E\S*") - made.in_loop(r"LDG\.E\S*\.128") == (8 if ahead else 9) * steps  # x, and gaps
    assert len(made.loop) <= most * 8 * steps
    assert "sizePerThread = [1, 4], threadsPerWarp = [32, 1]" in made.ttgir
    if chosen[
        "AHEAD"
    ]:  # they are loaded an iteration, or two, before they are used: not all are asked for and awaited in one
        carried = re.search(r"scf\.for .* iter_args\((.*)\) -> ", made.ttgir)
        assert carried and carried[1].count("= ") == 2 * chosen["AHEAD"] + m + 1  # gaps and values, sums, place in x
