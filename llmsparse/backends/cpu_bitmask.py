"""`cpu-bitmask`: the C kernel of `llmsparse.cpu`, for few tokens at a time, in fp32 and bf16.

Beyond that it is no faster than torch: the weight is unpacked into a scratch buffer, and torch multiplies.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from llmsparse.backends import cpu
from llmsparse.backends.cpu import pages
from llmsparse.backends.cpu.library import DTYPES
from llmsparse.backends.protocol import WeightSpec
from llmsparse.formats.bitmask import Bitmask


class Scratch(threading.local):
    """Memory of a thread, as large as the largest weight that it unpacked. What is allocated anew for each weight comes
    as untouched pages, and touching these takes ten times as long as unpacking."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if self.memory.numel() < size:
            self.memory = pages.zeros((size,), torch.uint8)
        return self.memory[:size].view(dtype).view(shape)


SCRATCH = Scratch()


class CpuBitmask:
    name = "cpu-bitmask"
    formats = ("bitmask",)
    compiles = False
    exact = True

    def why_not(self, spec: WeightSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"runs on the CPU; the device is {spec.device}"
        if spec.dtype not in DTYPES:
            return f"for float32 and bfloat16, this weight is {str(spec.dtype).removeprefix('torch.')}"
        return cpu.why_not()

    def wrong(self, device: torch.device) -> str | None:
        return None

    def tokens(self, spec: WeightSpec) -> int | None:
        return cpu.kernel_rows(spec.dtype, spec.dtype)

    def tokens_beside_copy(self, spec: WeightSpec) -> int:
        return cpu.rows_beside_copy(spec.dtype, spec.dtype)

    def prepare(self, packed: Bitmask, spec: WeightSpec) -> cpu.CpuWeight:
        return cpu.prepare(packed)

    def run(self, prepared: cpu.CpuWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], prepared.shape[-2])
        return cpu.matvec(prepared, x, bias)

    def run_many(self, prepared: Sequence[cpu.CpuWeight], x: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
        return cpu.matvecs(prepared, x, biases)

    def dense(self, prepared: cpu.CpuWeight) -> Tensor:
        return cpu.expand(prepared, torch.empty(prepared.shape, dtype=prepared.dtype))

    def borrow(self, prepared: cpu.CpuWeight) -> Tensor:
        if torch.is_grad_enabled():  # autograd would keep it
            return self.dense(prepared)
        return cpu.expand(prepared, SCRATCH.tensor(prepared.shape, prepared.dtype))

    def restore(self, prepared: cpu.CpuWeight) -> Bitmask:
        return prepared.packed()
