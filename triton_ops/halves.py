"""Two 16-bit floats in an int32: how kernels read them."""

# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def low(words, BF16: tl.constexpr):
    """int32 → float32: the value in the low half."""
    if BF16:
        return (words << 16).to(tl.float32, bitcast=True)
    else:
        return (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high(words, BF16: tl.constexpr):
    """int32 → float32: the value in the high half."""
    if BF16:
        return (words & -65536).to(tl.float32, bitcast=True)
    else:
        return ((words >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
