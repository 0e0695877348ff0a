"""`split24` against its reference, its residual alone, and what the compiler makes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aot import Compiler
from torch import Tensor

from triton_ops import reference
from triton_ops.mma24_kernel import entries_of_a_turn, run
from triton_ops.mma24_plan import PLANS, Plan
from triton_ops.split24 import add_residual, bits_per_weight, entries_for, linear, prepare, restore, split24, why_not

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize(
    "n,k,m,sparsity", [(1, 4, 1, 0.0), (63, 1028, 1, 0.7), (20, 260, 8, 0.6), (36, 300, 17, 0.7), (16, 64, 3, 1.0)]
)
def test_a_product_of_whole_numbers_is_exact(
    whole: Callable,
    poisoned: Callable,
    device: torch.device,
    n: int,
    k: int,
    m: int,
    sparsity: float,
    dtype: torch.dtype,
) -> None:
    x, weight, bias = whole(m, n, k, dtype, device, sparsity=sparsity)
    packed = prepare(weight)
    with poisoned():
        y, plain = linear(x, packed, bias), linear(x, packed)
    assert torch.equal(y, reference.linear(x, weight, bias))
    assert torch.equal(plain, reference.linear(x, weight))


@DTYPES
def test_a_product_is_the_reference(
    sparse: Callable, close: Callable, device: torch.device, dtype: torch.dtype
) -> None:
    weight = sparse(40, 1100, dtype, device, sparsity=0.7)
    x = sparse(4, 1100, dtype, device, sparsity=0.0, seed=1)
    close(linear(x, prepare(weight)), reference.linear(x, weight))


@DTYPES
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 1.0])
def test_a_weight_comes_back_to_the_bit(
    sparse: Callable, device: torch.device, sparsity: float, dtype: torch.dtype
) -> None:
    weight = sparse(37, 100, dtype, device, sparsity=min(sparsity, 0.99))
    weight[3:5] = -0.0  # a bit for every place, and more than two in a group
    packed = prepare(weight, reference.stored(weight))
    assert torch.equal(restore(packed).view(torch.int16), weight.view(torch.int16))
    rest = reference.split24(weight)[1]
    assert len(packed.entries) == int(reference.stored(rest).sum())


def test_seventy_percent_is_9_73_bits_a_weight(sparse: Callable) -> None:
    weight = sparse(512, 4096, torch.bfloat16, torch.device("cpu"), sparsity=0.7)
    packed = prepare(weight)
    held = sum(tensor.nbytes for tensor in (packed.two.vals, packed.two.meta, packed.entries, packed.offsets))
    offsets = 32 * 513 / weight.numel()
    assert held * 8 / weight.numel() == pytest.approx(bits_per_weight(0.7) + offsets, abs=0.02)
    assert bits_per_weight(0.7) == pytest.approx(9.7344) and bits_per_weight(0.5) == pytest.approx(12.0)


@DTYPES
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_one_token_takes_the_entries_along(
    whole: Callable, poisoned: Callable, device: torch.device, dtype: torch.dtype, parts: int
) -> None:
    """Of rows that have none, about as many as a turn adds, and by far more."""
    x, weight, bias = whole(1, 40, 1028, dtype, device, sparsity=0.7)  # 5 blocks: up to three turns of 2 warps
    weight[3], weight[39] = 0, 0
    weight[17], weight[38] = torch.ones_like(weight[:2])
    packed, cut = prepare(weight), Plan(1, 2, 2, True, parts)
    counts = packed.offsets.diff()
    assert counts[3] == 0 and counts[17] > 500 > 5 * entries_of_a_turn(counts.float().mean().item(), 5, cut)
    with poisoned():
        y = x.new_empty(1, 40)
        run(x, packed.two.vals, packed.two.meta, bias, y, cut, (packed.entries, packed.offsets))
    assert torch.equal(y, reference.linear(x, weight, bias))


def test_a_turn_adds_what_the_average_row_has_in_it() -> None:
    cut = PLANS[1]
    assert entries_of_a_turn(330, 56, cut) == 64  # 7 turns of 8 warps: 47 and a quarter more
    assert entries_of_a_turn(330, 56, cut._replace(parts=2)) == 64  # 4 turns of two programs
    assert entries_of_a_turn(0, 1, cut) == 16 and entries_of_a_turn(9000, 56, cut) == 256


@pytest.mark.parametrize("m", [2, 5])
def test_the_second_pass_adds_parts_entries_and_bias(poisoned: Callable, device: torch.device, m: int) -> None:
    """Row 0 has no entry, row 1 has two, row 2 one at the last column, rows 3 and 4 forty each."""
    columns = [2, 7, 63, *range(40), *range(10, 50)]
    values = torch.arange(1.0, 84.0).half()
    entries = values.view(torch.int16).int() << 16 | torch.tensor(columns, dtype=torch.int32)
    offsets = torch.tensor([0, 0, 2, 3, 43, 83], dtype=torch.int32)
    x = torch.randint(-3, 4, (m, 64), generator=torch.Generator().manual_seed(0)).half()
    parts = torch.arange(2.0 * m * 5).view(2, m, 5)
    bias = torch.tensor([10.0, 20, 30, 40, 50]).half()
    dense = torch.zeros(5, 64, dtype=torch.float64)
    for row in range(5):
        for place in range(offsets[row], offsets[row + 1]):
            dense[row, columns[place]] = values[place].double()
    wanted = (parts.sum(0).double() + x.double() @ dense.T + bias.double()).half()
    with poisoned():
        y = torch.empty(m, 5, dtype=torch.float16, device=device)
        arguments = (one.to(device) for one in (x, parts, entries, offsets, bias))
        add_residual(*arguments, y)
    assert torch.equal(y.cpu(), wanted)


def test_the_operator_has_a_shape_on_meta(whole: Callable, device: torch.device) -> None:
    x, weight, bias = whole(2, 24, 64, torch.bfloat16, device, sparsity=0.5)
    packed = prepare(weight)
    arguments = (x, packed.two.vals, packed.two.meta, packed.entries, packed.offsets, bias)
    torch.library.opcheck(split24, arguments)
    assert split24(*(one.to("meta") for one in arguments)).shape == (2, 24)
    assert linear(x[:0], packed).shape == (0, 24)


def test_what_cannot_be_is_refused(sparse: Callable[..., Tensor]) -> None:
    cuda = torch.device("cuda")
    assert why_not((8, 65540), torch.float16, cuda, 1) == "split24 takes K up to 65536, got 65540"
    assert why_not((8, 64), torch.float16, cuda, 33) == "split24 takes 1 to 32 tokens, got 33"
    weight = sparse(8, 64, torch.float16, torch.device("cpu"), sparsity=0.5)
    with pytest.raises(ValueError, match="K up to 65536, got 65540"):
        prepare(weight.new_zeros(1, 65540))
    with pytest.raises(ValueError, match="the keep-mask leaves out a weight"):
        prepare(weight, torch.zeros_like(weight, dtype=torch.bool))


@pytest.mark.parametrize("entries", [16, 64])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("cc", [90, *(pytest.param(cc, marks=pytest.mark.slow) for cc in (80, 100))])
def test_the_entries_are_read_beside_the_fragments(compiled: Compiler, cc: int, parts: int, entries: int) -> None:
    cut, finished = PLANS[1], parts == 1
    pointers = {name: "*i32" for name in ("vals", "meta", "entries", "offsets")} | {"x": "*bf16", "bias": "*bf16"}
    constants = {"TILES": cut.tiles, "TOKENS": 1, "WARPS": cut.warps, "GROUP": cut.group, "DIRECT": True}
    made = compiled(
        kernel="triton_ops.mma24_kernel:mma24_kernel",
        signature=pointers
        | {"y": "*bf16" if finished else "*fp32"}
        | dict.fromkeys(("M", "N", "K", "tiles", "blocks", "parts"), "i32"),
        constants=constants
        | {"ENTRIES": entries, "FINISHED": finished, "BIAS": finished, "BF16": True, "EMULATE": False},
        cc=cc,
        warps=cut.warps,
        divisible="N K",
    )
    assert made.in_loop(r"HMMA\.SP\.16832\.F32") == 8 and made.in_loop(r"LDG\.E\S*\.128") == 9
    assert made.in_loop("LDG") == 9 + 32 + 2 * entries // 16  # an entry and its input, 16 · entries of 256 threads
    assert made.in_loop("LDS|STS|SHFL|BAR|LDGSTS") == 0
    assert made.stack == 0 and made.registers <= 128
    assert len(made.assembly_layouts()) == 8 and "threadsPerWarp = [32, 1]" in made.assembly_layouts()[0]
    assert len(set(made.assembly_layouts())) == 1


@pytest.mark.parametrize("tokens", [2, 8, 32])
@pytest.mark.parametrize("cc", [90, *(pytest.param(cc, marks=pytest.mark.slow) for cc in (80, 100))])
def test_the_residual_compiles_to_wide_loads_of_tokens_without_spills(compiled: Compiler, tokens: int, cc: int) -> None:
    pointers = {
        "turned": "*bf16",
        "parts": "*fp32",
        "entries": "*i32",
        "offsets": "*i32",
        "bias": "*bf16",
        "y": "*bf16",
    }
    made = compiled(
        kernel="triton_ops.split24:add_residual_kernel",
        signature=pointers | {"M": "i32", "N": "i32"},
        constants={"PARTS": 2, "TOKENS": tokens, "ROWS": 4, "ENTRIES": entries_for(tokens), "BIAS": True, "BF16": True},
        cc=cc,
        divisible="N",
    )
    assert made.stack == 0 and made.count("LDL|STL") == 0
    if tokens >= 8:
        assert made.count(r"LDG\.E\S*\.128") >= 1  # eight tokens of an input at once
