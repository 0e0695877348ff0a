"""Device functions that both bitmask kernels share: which values belong to four columns, and the bits before them."""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(words, PTX: tl.constexpr):
    """Bits set in each int32: NVIDIA's instruction by name, for not every LLVM finds it in shifts and adds. Those are for
    the interpreter, and for other GPUs."""
    if PTX:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        bits = words.to(tl.uint32, bitcast=True)
        bits = bits - ((bits >> 1) & 0x55555555)
        bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
        bits = (bits + (bits >> 4)) & 0x0F0F0F0F
        return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def four_columns(values, words, before, PTX: tl.constexpr):
    """The weights of columns 4g, 4g + 1, 4g + 2, 4g + 3 of each word: four tensors (ROWS, WORDS, 8), pruned places 0.

    values  pointers (ROWS,)          the value that `before` counts from
    words   int32 (ROWS, WORDS)
    before  int32 (ROWS, WORDS)       kept values that come before each word
    """
    shift = 4 * tl.arange(0, 8)[None, None, :]
    wide = words[:, :, None]
    at = values[:, None, None] + (before[:, :, None] + popcount(wide & ((1 << shift) - 1), PTX))  # (ROWS, WORDS, 8)
    nibble = wide >> shift
    keep0, keep1, keep2, keep3 = nibble & 1, (nibble >> 1) & 1, (nibble >> 2) & 1, (nibble >> 3) & 1
    weight0 = tl.load(at, mask=keep0 != 0, other=0.0)
    at += keep0
    weight1 = tl.load(at, mask=keep1 != 0, other=0.0)
    at += keep1
    weight2 = tl.load(at, mask=keep2 != 0, other=0.0)
    at += keep2
    weight3 = tl.load(at, mask=keep3 != 0, other=0.0)
    return weight0, weight1, weight2, weight3
