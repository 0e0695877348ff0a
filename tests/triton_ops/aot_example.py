"""A kernel for the test of the harness."""

import triton
import triton.language as tl


@triton.jit
def copy(source, target, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < count), mask=place < count)
