"""`cpu-nested`: the C kernels of `cpu/nested.py`, for few tokens at a time, in fp32 and bf16; more are torch's, unpacked.

`cpu-nested-int8`: the same layout, multiplied with activations that are rounded to 8 bits: not the product to its last bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llmsparse.backends.cpu import nested
from llmsparse.backends.cpu.library import DTYPES
from llmsparse.backends.cpu_bitmask import SCRATCH
from llmsparse.backends.protocol import WeightSpec
from llmsparse.formats.nested import Nested


class CpuNested:
    formats = ("nested",)
    compiles = False

    def __init__(self, name: str = "cpu-nested", *, int8: bool = False) -> None:
        self.name, self.int8, self.exact = name, int8, not int8

    def why_not(self, spec: WeightSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"runs on the CPU; the device is {spec.device}"
        for dtype in (spec.dtype, spec.stored):
            if dtype is not None and dtype not in DTYPES:
                return f"for float32 and bfloat16, this weight is {str(dtype).removeprefix('torch.')}"
        if spec.group is not None and spec.group % nested.RUN and spec.group < spec.shape[-1]:
            return (
                f"for steps of whole rows or multiples of {nested.RUN} columns, this weight has one every {spec.group}"
            )
        return nested.why_not()

    def wrong(self, device: torch.device) -> str | None:
        return None

    def tokens(self, spec: WeightSpec) -> int | None:
        return nested.kernel_rows(spec.stored or spec.dtype, spec.dtype, int8=self.int8)

    def tokens_beside_copy(self, spec: WeightSpec) -> int:
        return nested.rows_beside_copy(spec.stored or spec.dtype, spec.dtype, self.int8)

    def tokens_of(self, prepared: nested.CpuNested) -> int:
        return nested.kernel_rows(prepared.frame.stored, prepared.dtype, prepared.wide, self.int8)

    def prepare(self, packed: Nested, spec: WeightSpec) -> nested.CpuNested:
        return nested.prepare(packed, int8=self.int8)

    def run(self, prepared: nested.CpuNested, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], prepared.shape[-2])
        if x.numel() <= self.tokens_of(prepared) * x.shape[-1]:
            return nested.matvec(prepared, x, bias, int8=self.int8)
        return self.run_beyond(prepared, x, bias)

    def run_beyond(self, prepared: nested.CpuNested, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() <= nested.kernel_rows(prepared.frame.stored, prepared.dtype, prepared.wide) * x.shape[-1]:
            return nested.matvec(prepared, x, bias)
        return functional.linear(x, self.borrow(prepared), bias)

    def dense(self, prepared: nested.CpuNested) -> Tensor:
        return nested.expand(prepared, torch.empty(prepared.shape, dtype=prepared.dtype))

    def borrow(self, prepared: nested.CpuNested) -> Tensor:
        if torch.is_grad_enabled():  # autograd would keep it
            return self.dense(prepared)
        return nested.expand(prepared, SCRATCH.tensor(prepared.shape, prepared.dtype))

    def restore(self, prepared: nested.CpuNested) -> Nested:
        return prepared.packed()
