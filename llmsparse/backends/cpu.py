"""`cpu-bitmask`: the C kernel of `llmsparse.cpu`, for a few tokens at a time in fp32 and bf16.

Beyond that it is no faster than torch: the weight is unpacked, and torch multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsparse import cpu
from llmsparse.backends.protocol import WeightSpec
from llmsparse.formats.bitmask import Bitmask

DTYPES = (torch.float32, torch.bfloat16)


class CpuBitmask:
    name = "cpu-bitmask"
    tokens: int | None = 4
    compiles = False

    def why_not(self, spec: WeightSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"runs on the CPU, this weight is on {spec.device}"
        if spec.dtype not in DTYPES:
            return f"for float32 and bfloat16, this weight is {str(spec.dtype).removeprefix('torch.')}"
        return cpu.why_not()

    def prepare(self, packed: Bitmask, spec: WeightSpec) -> cpu.CpuWeight:
        return cpu.prepare(packed)

    @torch.compiler.disable
    def run(self, prepared: cpu.CpuWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        y = cpu.matvec(prepared, x.reshape(-1, x.shape[-1]).contiguous(), bias)
        return y.view(*x.shape[:-1], -1)

    def dense(self, prepared: cpu.CpuWeight) -> Tensor:
        return prepared.packed().unpack()

    def restore(self, prepared: cpu.CpuWeight) -> Bitmask:
        return prepared.packed()
