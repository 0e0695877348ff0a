"""`cpu-dense`: the weight is unpacked once and kept, as by `dense`; few tokens are multiplied by a C kernel, more by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsparse.backends.cpu import dense, pages
from llmsparse.backends.cpu.library import DTYPES
from llmsparse.backends.dense import DenseWeight
from llmsparse.backends.protocol import WeightSpec
from llmsparse.formats import PackedTensor


class CpuDense:
    name = "cpu-dense"
    formats = None
    compiles = False
    exact = True

    def why_not(self, spec: WeightSpec) -> str | None:
        return why_not(spec.device, spec.dtype)

    def wrong(self, device: torch.device) -> str | None:
        return None

    def tokens(self, spec: WeightSpec) -> int | None:
        return dense.kernel_rows(spec.dtype, spec.shape[-1])

    def prepare(self, packed: PackedTensor, spec: WeightSpec) -> DenseWeight:
        return DenseWeight(pages.copy(packed.unpack()), packed.emptied())

    def run(self, prepared: DenseWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], prepared.weight.shape[-2])
        return dense.matvec(prepared.weight, x, bias)

    def dense(self, prepared: DenseWeight) -> Tensor:
        return prepared.weight

    borrow = dense

    def restore(self, prepared: DenseWeight) -> PackedTensor:
        return prepared.emptied.filled(prepared.weight)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel is of no use for weights of `dtype` on `device`, in a few words; None if it is."""
    if device.type != "cpu":
        return f"runs on the CPU; the device is {device}"
    if dtype not in DTYPES:
        return f"for float32 and bfloat16, this weight is {str(dtype).removeprefix('torch.')}"
    if (reason := dense.why_not()) is not None:
        return reason
    return None if dense.kernel_rows(dtype, 1) else "this CPU has neither AVX-512 nor AVX2"
