"""2:4 on the sparse tensor core, for decoding: x (M, K) with M = 1…32 times a weight in fragment order.

The instruction does the work of 8 tokens or of one in the same time, and is far from the limit at either: what is saved is
the bytes, 9 bits a weight against 16. How they are kept flowing is in mma24_kernel.py; how a product is cut over warps and
programs, in mma24_plan.py. x is read as it stands up to 8 tokens; beyond, a small kernel first puts it in the order of the
registers (pack_x.py).

On hardware: never run. The compiled code, the packing and, in Triton's interpreter with the instruction emulated, the
results have been checked; eval/gpu_session and tests/triton_ops/test_gpu.py are for the first GPU at hand. PLANS comes
from arithmetic (bytes enough under way to cover the memory's latency), not from timing.
"""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor

from triton_ops.mma24_kernel import run
from triton_ops.mma24_plan import plan
from triton_ops.pack24 import BITS_PER_WEIGHT, Fragments24, pack24, unpack24
from triton_ops.requirements import aligned, check, unmet

NAME = "mma24"
MOST_TOKENS = 32
CAPABILITY = (8, 0)
bits_per_weight = BITS_PER_WEIGHT


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, m: int) -> str | None:
    """Why a weight of this shape (N, K) cannot be multiplied here for M tokens, or None."""
    return unmet(NAME, shape, dtype, device, m, most=MOST_TOKENS, capability=CAPABILITY)


def prepare(weight: Tensor, keep: Tensor | None = None) -> Fragments24:
    """(N, K) fp16 or bf16 with zeros → fragments, on the weight's device. Errors as for `pack24`."""
    return pack24(weight, keep)


def restore(packed: Fragments24) -> Tensor:
    """The weight that `prepare` was given, (N, K), to the bit."""
    return unpack24(packed)


def linear(x: Tensor, packed: Fragments24, bias: Tensor | None = None) -> Tensor:
    """x (M, K), bias (N,) → (M, N) in x's dtype, summed in float32. ValueError where dtypes, shapes or device do not
    fit. Safe in a CUDA graph: three launches at most, and memory only from torch's allocator."""
    check(NAME, x, packed.shape, packed.dtype, bias, most=MOST_TOKENS)
    return mma24(x, packed.vals, packed.meta, packed.shape[0], bias)


@torch.library.custom_op("triton_ops::mma24", mutates_args=())
def mma24(x: Tensor, vals: Tensor, meta: Tensor, n: int, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape[0], n)
    if len(y):
        with torch.cuda.device_of(x):  # Triton launches on the current device
            run(aligned(x), vals, meta, bias, y, plan(n, x.shape[1], len(x)))
    return y


@mma24.register_fake
def _(x: Tensor, vals: Tensor, meta: Tensor, n: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], n)
