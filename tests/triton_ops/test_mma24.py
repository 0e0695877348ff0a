"""`mma24` against its reference: the whole kernel in the interpreter, where only the instruction itself is emulated, and
that emulation against the PTX ISA's own tables; then what the compiler makes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from aot import Compiler
from ptx import mma_sp as by_the_tables
from torch import Tensor

from triton_ops import mma24, reference
from triton_ops.mma24 import linear, prepare, restore, why_not
from triton_ops.mma24_kernel import run
from triton_ops.mma24_plan import PLANS, Plan, plan
from triton_ops.mma_sp import mma_sp
from triton_ops.pack24 import pack24
from triton_ops.pack_x import pack_x
from triton_ops.requirements import INTERPRETED

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize(
    "n,k,m", [(16, 256, 1), (63, 100, 3), (40, 2100, 8), (16, 260, 9), (100, 516, 17), (33, 300, 32)]
)


@DTYPES
@SHAPES
def test_a_product_of_whole_numbers_is_exact(
    whole: Callable, poisoned: Callable, device: torch.device, n: int, k: int, m: int, dtype: torch.dtype
) -> None:
    x, weight, bias = whole(m, n, k, dtype, device)
    packed = prepare(weight)
    with poisoned():
        y = linear(x, packed, bias)
    assert torch.equal(y, reference.linear(x, weight, bias))
    assert torch.equal(restore(packed), weight)


@DTYPES
@SHAPES
def test_a_product_is_the_reference(
    sparse: Callable,
    poisoned: Callable,
    close: Callable,
    device: torch.device,
    n: int,
    k: int,
    m: int,
    dtype: torch.dtype,
) -> None:
    weight = sparse(n, k, dtype, device)
    x = sparse(m, k, dtype, device, sparsity=0.0, seed=1)
    with poisoned():
        y = linear(x, prepare(weight))
    close(y, reference.linear(x, weight))


@pytest.mark.parametrize(
    "m,cut",
    [
        (3, Plan(1, 2, 8, True, 3)),
        (8, Plan(2, 4, 1, False, 2)),
        (12, Plan(1, 2, 4, False, 2)),
        (32, Plan(2, 4, 2, False, 5)),
    ],
)
def test_any_cut_gives_the_same(whole: Callable, poisoned: Callable, device: torch.device, m: int, cut: Plan) -> None:
    x, weight, bias = whole(m, 72, 1540, torch.bfloat16, device)  # 5 tiles of rows, 7 blocks of inputs
    packed = prepare(weight)
    with poisoned():
        y = x.new_empty(m, 72)
        run(x, packed.vals, packed.meta, bias, y, cut)
    assert torch.equal(y, reference.linear(x, weight, bias))


def test_few_rows_are_shared_by_more_programs_and_many_are_not() -> None:
    assert plan(28672, 8192, 1) == PLANS[1] and plan(28672, 8192, 2) == PLANS[8]
    assert plan(4096, 14336, 8).parts == 1  # 128 programs of 8 warps
    assert plan(1024, 4096, 1).parts == 2  # 64 of them; 16 blocks leave one for each of 2 · 8 warps
    assert plan(16, 256, 32).parts == 1
    for m in (1, 8, 9, 16, 17, 32):
        assert plan(4096, 14336, m).parts * plan(4096, 14336, m).warps <= 14336 // 256


def test_the_emulated_instruction_is_that_of_the_tables(sparse: Callable[..., Tensor]) -> None:
    if not INTERPRETED:
        pytest.skip("the emulation is for the interpreter")
    packed = pack24(sparse(16, 512, torch.float16, torch.device("cpu")))
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(2)).half()
    tokens = reference.pack_x(x)
    for tile in range(16):
        a, b, meta = packed.vals[0, tile], tokens[0, tile], packed.meta[0, tile // 8]  # (32, 4)
        got = torch.full((32, 4), torch.nan)
        _instruction[(1,)](a, b, meta, got, tile % 8)
        product = by_the_tables(a, b, meta[:, tile % 8 // 2], tile % 2, torch.float16)
        # c0, c1 stand in row g, c2, c3 in row g + 8; columns 2·t and 2·t + 1
        fragment = product.view(2, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4)
        torch.testing.assert_close(got.double(), fragment, rtol=1e-5, atol=1e-5)


@triton.jit
def _instruction(a, b, meta, out, TILE: tl.constexpr):
    """One tile of rows by one of tokens, one warp."""
    at = tl.arange(0, 32)[:, None] * 4 + tl.arange(0, 4)[None, :]
    total = mma_sp(
        tl.load(a + at), tl.load(b + at), tl.zeros([32, 4], tl.float32), tl.load(meta + at), TILE, False, True
    )
    tl.store(out + at, total)


@pytest.mark.parametrize("m,k", [(9, 256), (17, 300), (32, 512)])
def test_x_is_put_in_the_order_of_the_reference(poisoned: Callable, device: torch.device, m: int, k: int) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = reference.pack_x(torch.nn.functional.pad(x, (0, -k % 256)))
    with poisoned():
        got = pack_x(x.to(device), -(-m // 8), -(-k // 256))
    assert torch.equal(got.cpu(), wanted)


def test_no_tokens_and_a_view(whole: Callable, device: torch.device) -> None:
    x, weight, _ = whole(6, 20, 64, torch.float16, device)
    packed = prepare(weight)
    assert linear(x[:0], packed).shape == (0, 20)
    view = x.repeat(1, 2)[::2, :64]
    assert not view.is_contiguous()
    assert torch.equal(linear(view, packed), reference.linear(x[::2], weight))


def test_the_operator_has_a_shape_on_meta(whole: Callable) -> None:
    x, weight, bias = whole(4, 24, 64, torch.bfloat16, torch.device("cpu"))
    vals, meta, shape, _ = prepare(weight)
    arguments = (x, vals, meta, shape[0], bias)
    torch.library.opcheck(mma24.mma24, arguments)
    assert mma24.mma24(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)).shape == (4, 24)


def test_it_says_why_not() -> None:
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    assert why_not((64, 64), torch.float32, cuda, 1) == "mma24 takes float16 or bfloat16, got torch.float32"
    assert why_not((64, 66), bf16, cuda, 1) == "mma24 needs K a multiple of 4, got 66"
    assert why_not((64, 64), bf16, cuda, 33) == "mma24 takes 1 to 32 tokens, got 33"
    assert why_not((64, 64), bf16, torch.device("cpu"), 1) == "mma24 needs a CUDA device, got cpu"


def test_what_does_not_fit_is_refused(whole: Callable, device: torch.device) -> None:
    x, weight, bias = whole(4, 24, 64, torch.bfloat16, device)
    packed = prepare(weight)
    for wrong, message in [
        ((x[:, :60], packed, bias), r"x is \(4, 60\), wanted \(M, 64\) with M up to 32"),
        ((x.repeat(9, 1), packed, bias), r"x is \(36, 64\)"),
        ((x.half(), packed, bias), r"x is torch\.float16, the weight torch\.bfloat16"),
        ((x, packed, bias[:20]), r"bias is \(20,\), wanted \(24,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear(*wrong)


POINTERS = {"x": "*{x}", "vals": "*i32", "meta": "*i32", "bias": "*{half}", "y": "*{half}"}
NUMBERS = dict.fromkeys(("M", "N", "K", "tiles", "blocks", "parts"), "i32")
TOKENS = (1, 8, 16, 32)


def compile_mma24(compiled: Compiler, m: int, cc: int, half: str = "bf16"):
    cut, tokens = plan(28672, 8192, m), -(-m // 8)
    signature = {name: kind.format(x=half if cut.direct else "i32", half=half) for name, kind in POINTERS.items()}
    constants = {"TILES": cut.tiles, "TOKENS": tokens, "WARPS": cut.warps, "GROUP": cut.group, "DIRECT": cut.direct}
    constants |= {"entries": None, "offsets": None, "ENTRIES": 0}
    constants |= {"FINISHED": True, "BIAS": True, "BF16": half == "bf16", "EMULATE": False}
    return compiled(
        kernel="triton_ops.mma24_kernel:mma24_kernel",
        signature=signature | NUMBERS,
        constants=constants,
        cc=cc,
        warps=cut.warps,
        divisible="N K",
    )


@pytest.mark.parametrize(
    "m,cc,half",
    [
        *((m, 90, "bf16") for m in TOKENS),
        *(pytest.param(m, cc, "bf16", marks=pytest.mark.slow) for m in TOKENS for cc in (80, 86, 89, 100, 120)),
        *(pytest.param(m, 90, "fp16", marks=pytest.mark.slow) for m in TOKENS),
    ],
)
def test_the_compiled_loop_is_the_instruction_and_wide_loads(compiled: Compiler, m: int, cc: int, half: str) -> None:
    made = compile_mma24(compiled, m, cc, half)
    tiles, tokens = plan(28672, 8192, m).tiles, -(-m // 8)
    kind = {"bf16": r"\.BF16", "fp16": ""}[half]
    assert made.in_loop(r"HMMA\.SP\.16832\.F32" + kind) == 8 * tiles * tokens
    wide = 9 * tiles + (0 if m <= 8 else 8 * tokens)  # vals and metadata, and x in the order of the registers
    assert made.in_loop(r"LDG\.E\S*\.128") == wide
    assert made.in_loop("LDG") == wide + (32 if m <= 8 else 0)  # or x as it stands, a word at a time
    assert made.in_loop("LDS|STS|SHFL|BAR|LDGSTS") == 0  # nothing changes hands
    assert made.stack == 0 and made.count("LDL|STL") == 0
    two_to_a_multiprocessor = m <= 8 or (m == 16 and cc != 120)  # programs of 256 threads
    assert made.registers <= (128 if two_to_a_multiprocessor else 192)
    in_flight = longest_run_of_loads(made.loop)
    assert in_flight >= 8, f"the compiler lets only {in_flight} loads run ahead"


def longest_run_of_loads(loop: list[str]) -> int:
    """Loads after which no product follows at once: how many are under way together, round the loop's end too."""
    kinds = "".join("H" if "HMMA" in one else "L" if "LDG" in one else "" for one in loop)
    return max(map(len, (kinds * 2).split("H")))


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("cc", [90, *(pytest.param(cc, marks=pytest.mark.slow) for cc in (80, 100))])
def test_four_elements_of_a_thread_are_one_instruction(compiled: Compiler, m: int, cc: int) -> None:
    """The assumption that mma_sp.py stands on, as the compiler wrote it down: a row of four to a thread, rows to lanes in
    order, blocks of 32 rows to warps in order."""
    made, cut = compile_mma24(compiled, m, cc), plan(28672, 8192, m)
    layout = (
        "#ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [32, 1], "
        f"warpsPerCTA = [{cut.warps}, 1], order = [1, 0]}}>"
    )
    assert made.assembly_layouts() == [layout] * (8 * cut.tiles * -(-m // 8))
