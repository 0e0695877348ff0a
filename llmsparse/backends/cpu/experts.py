"""Mixtures of experts on the CPU, for few tokens: gate, up, SiLU, down and the weighted sum in one call of a C kernel.

Only the rows of experts that a token chose are read, each once, where they lie. AVX-512 (BF16), AVX2 and portable kernels
are chosen by what the CPU has; the result does not depend on the number of threads, which is torch's. The kernel is
compiled at first use, as the one for packed weights is.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from llmsparse.backends.cpu.kernel_library import KernelLibrary
from llmsparse.backends.cpu.library import DTYPES
from llmsparse.errors import RecipeError

SIGNATURES = {
    "kernel_name": (c_char_p, (c_int32,)),
    "kernel_fits": (c_int32, (c_int32, c_int32)),
    "run_experts": (
        c_int32,
        (c_void_p, c_int32, c_void_p, c_int32, c_void_p, c_void_p, c_int32, c_void_p, c_int32),
    ),
}


LIBRARY = KernelLibrary(
    "CPU kernel of experts", ("experts.c", "rows.h", "rows_x86.h", "avx.h", "floats.h", "share.h", "team.h"), SIGNATURES
)


class Stacked(ctypes.Structure):
    """`struct experts` of experts.c."""

    _fields_ = (
        ("gate", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
        ("inner_step", c_int64),
        ("outer_step", c_int64),
        ("count", c_int64),
        ("width", c_int64),
        ("inner", c_int64),
        ("dtype", c_int32),
    )


def why_not() -> str | None:
    """Why the kernel cannot run here, in one line; None if it can. Builds it at the first call."""
    return LIBRARY.why_not()


@cache
def kernels(dtype: torch.dtype) -> dict[str, int]:
    """Name → number of the kernels that this CPU can run on weights of `dtype`, the fastest first.

    RecipeError for any other dtype than bfloat16 and float32, MachineError where there is no kernel (`why_not`).
    """
    if dtype not in DTYPES:
        raise RecipeError(f"the CPU kernel of experts takes bfloat16 or float32, not {dtype}")
    return LIBRARY.fitting(DTYPES[dtype])


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, shares: Tensor, *, kernel: str | None = None
) -> Tensor:
    """x (tokens, width), gate_up (experts, 2 · inner, width), gates first, down (experts, width, inner), and of each
    token the experts `index` (tokens, k) and their `shares` (tokens, k) → (tokens, width).

    x and weights are all bfloat16 or all float32; accumulated in float32. An index that is no expert adds nothing. No
    gradient flows. `kernel` takes a name of `kernels()` in place of the fastest. ValueError for shapes that do not fit.
    """
    count, double, width = gate_up.shape
    inner = double // 2
    if down.shape != (count, width, inner) or double != 2 * inner:
        raise ValueError(f"gate_up is {list(gate_up.shape)}, down {list(down.shape)}, wanted [E, 2n, d] and [E, d, n]")
    gate_up, down = gate_up.contiguous(), down.contiguous()
    gate = gate_up.data_ptr()
    size = gate_up.element_size()
    stacked = Stacked(
        gate, gate + inner * width * size, down.data_ptr(), 2 * inner * width * size, inner * width * size,
        count, width, inner, size,
    )  # fmt: skip
    return _run(stacked, x, (gate_up, down), index, shares, kernel)


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, kernel: str | None = None) -> Tensor:
    """down (silu(gate x) ∘ up x): x (..., width), gate and up (inner, width), down (width, inner) → (..., width)."""
    inner, width = gate.shape
    if up.shape != gate.shape or down.shape != (width, inner):
        raise ValueError(f"gate is {list(gate.shape)}, up {list(up.shape)}, down {list(down.shape)}: they do not fit")
    gate, up, down = gate.contiguous(), up.contiguous(), down.contiguous()
    stacked = Stacked(gate.data_ptr(), up.data_ptr(), down.data_ptr(), 0, 0, 1, width, inner, gate.element_size())
    rows = x.reshape(-1, x.shape[-1])
    index, shares = torch.zeros(len(rows), 1, dtype=torch.int64), torch.ones(len(rows), 1)
    return _run(stacked, rows, (gate, up, down), index, shares, kernel).view(x.shape)


def _run(
    stacked: Stacked, x: Tensor, weights: tuple[Tensor, ...], index: Tensor, shares: Tensor, kernel: str | None
) -> Tensor:
    if x.dim() != 2 or x.shape[1] != stacked.width or index.shape != shares.shape or index.shape[:1] != x.shape[:1]:
        shapes = f"x is {list(x.shape)}, index {list(index.shape)}, shares {list(shares.shape)}"
        raise ValueError(f"{shapes}, wanted [tokens, {stacked.width}], [tokens, k] and [tokens, k]")
    if any(weight.dtype != x.dtype for weight in weights):
        raise ValueError(f"x is {x.dtype}, the weights are {', '.join(str(weight.dtype) for weight in weights)}")
    if any(tensor.device.type != "cpu" for tensor in (x, index, shares, *weights)):
        raise ValueError("the CPU kernel of experts takes tensors on the cpu")
    numbers = kernels(x.dtype)
    number = numbers[kernel] if kernel else next(iter(numbers.values()))
    x, index, shares = x.contiguous(), index.long().contiguous(), shares.float().contiguous()
    y = torch.empty_like(x)
    status = LIBRARY.loaded().run_experts(
        ctypes.byref(stacked), number, x.data_ptr(), len(x), index.data_ptr(), shares.data_ptr(), index.shape[1],
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise MemoryError
    return y
