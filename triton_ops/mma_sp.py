"""One instruction of the sparse tensor core, `mma.sp.m16n8k32`, as a Triton function.

Triton has no operation for it, but inline assembly, which runs once for every `pack` elements that a thread holds. The
operands of one instruction are four 32-bit registers a lane each, so with tensors (32·warps, 4), a row to each lane in
order, the four elements of a thread are the operands of exactly one. That the compiler deals them so follows from
16-byte loads along the last axis; it is no promise of Triton's, so the tests assert it on the compiled TTGIR, and
selftest.py on the device. A tensor with further axes would not do: Triton 3.6 deals lanes along those first.

`EMULATE` computes the same from the same registers in Triton's own operations: for the interpreter, which knows no
assembly. tests/triton_ops/test_mma24.py holds it against the tables of the PTX ISA.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from triton_ops.halves import high, low

LEGAL = tl.constexpr(0x44444444)  # metadata: places 0 and 1 of every group. 0 would be undefined behaviour


def _assembly(kind: str) -> tl.constexpr:
    """The instruction for each of the eight tiles that a lane's four words of metadata serve."""
    name = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32"
    registers = "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9, $10, $11}, {$12, $13, $14, $15}"
    return tl.constexpr(tuple(f"{name} {registers}, ${16 + tile // 2}, {tile % 2};" for tile in range(8)))


BF16_ASSEMBLY, FP16_ASSEMBLY = _assembly("bf16"), _assembly("f16")
CONSTRAINTS = tl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r")


@triton.jit
def mma_sp(a, b, total, metadata, TILE: tl.constexpr, BF16: tl.constexpr, EMULATE: tl.constexpr):
    """total + A·B for every warp.

    All (32·W, 4): a int32, the kept values of 16 rows × 32 inputs; b int32, 32 inputs × 8 tokens; total float32, 16 rows
    × 8 tokens; metadata int32 for eight tiles, of which TILE is this one: each in the registers that the PTX ISA names
    (reference.py).
    """
    if EMULATE:
        return total + _emulated(a, b, metadata, TILE, BF16)
    elif BF16:
        return tl.inline_asm_elementwise(
            BF16_ASSEMBLY[TILE], CONSTRAINTS, [a, b, total, metadata], dtype=tl.float32, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            FP16_ASSEMBLY[TILE], CONSTRAINTS, [a, b, total, metadata], dtype=tl.float32, is_pure=True, pack=4
        )


@triton.jit
def _emulated(a, b, metadata, TILE: tl.constexpr, BF16: tl.constexpr):
    W: tl.constexpr = a.shape[0] // 32
    # metadata word TILE // 2 of the lanes 4·g + 2·(TILE % 2) + h, for the groups 4·h … 4·h + 3
    word = tl.arange(0, 4)[None, :] == TILE // 2
    words = tl.reshape(tl.sum(tl.where(word, metadata, 0), 1), [W, 8, 2, 2])  # w, g, selector, h
    chosen = tl.arange(0, 2)[None, None, :, None] == TILE % 2
    words = tl.sum(tl.where(chosen, words, 0), 2)  # w, g, h
    thread = tl.arange(0, 4)[None, None, :, None, None]
    lower = tl.arange(0, 2)[None, None, None, None, :]  # rows g, or g + 8
    nibble = words[:, :, None, :, None] >> (16 * lower + 4 * thread)  # w, g, t, h, lower
    pairs = tl.reshape(a, [W, 8, 4, 2, 2])  # register 2·h + lower
    place = tl.arange(0, 4)[None, None, None, None, None, :]
    first = tl.where((nibble & 3)[:, :, :, :, :, None] == place, low(pairs, BF16)[:, :, :, :, :, None], 0.0)
    second = tl.where(((nibble >> 2) & 3)[:, :, :, :, :, None] == place, high(pairs, BF16)[:, :, :, :, :, None], 0.0)
    rows = tl.permute(first + second, [0, 4, 1, 3, 2, 5])  # w, lower, g, h, t, place: row 8·lower + g
    rows = tl.reshape(rows, [W, 16, 1, 32])
    tokens = tl.reshape(tl.join(low(b, BF16), high(b, BF16)), [W, 8, 4, 4, 2])  # w, n, thread, register, half
    tokens = tl.reshape(tl.permute(tokens, [0, 1, 3, 2, 4]), [W, 1, 8, 32])  # input 8·register + 2·thread + half
    product = tl.reshape(tl.sum(rows * tokens, 3), [W, 2, 8, 4, 2])  # w, lower, g, thread, odd: token 2·thread + odd
    return tl.reshape(tl.permute(product, [0, 2, 3, 1, 4]), [W * 32, 4])  # register 2·lower + odd
