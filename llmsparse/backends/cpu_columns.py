"""`cpu-columns`: what runs packed layers that leave inputs out. The weight lies column by column without its zeros, and the C
kernel reads the columns whose inputs count; more tokens at once are multiplied by torch, from the weight with its zeros.

It is chosen by the layer and not by name: without inputs that are left out other layouts are faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.backends.cpu import columns
from llmsparse.backends.cpu.columns import Columns
from llmsparse.backends.protocol import WeightSpec
from llmsparse.formats import PackedTensor
from llmsparse.formats.bitmask import Bitmask
from llmsparse.sparsity.activation import Cut

TOKENS = 16  # more are multiplied by torch
ALL = Cut(threshold=-1.0)


@dataclass(frozen=True)
class ColumnsWeight:
    """A weight by columns, and what tells how it was packed."""

    columns: Columns
    emptied: PackedTensor


class CpuColumns:
    name = "cpu-columns"
    formats = ("bitmask",)
    compiles = False

    def why_not(self, spec: WeightSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"runs on the CPU; the device is {spec.device}"
        if spec.format != Bitmask.FORMAT or len(spec.shape) != 2 or spec.transposed:
            return "for masked weights of linear layers"
        return None if columns.usable(torch.empty(0, dtype=spec.dtype)) else "the kernel cannot run here"

    def wrong(self, device: torch.device) -> str | None:
        return None

    def tokens(self, spec: WeightSpec) -> int | None:
        return TOKENS

    def prepare(self, packed: PackedTensor, spec: WeightSpec) -> ColumnsWeight:
        return ColumnsWeight(Columns.without_zeros(packed.unpack()), packed.emptied())

    def run(self, prepared: ColumnsWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.run_cut(prepared, ALL, x, bias)

    def run_cut(self, prepared: ColumnsWeight, cut: Cut, x: Tensor, bias: Tensor | None) -> Tensor:
        """cut(x) · Wᵀ + bias."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], prepared.columns.shape[0])
        return columns.product(prepared.columns, cut, x, bias)

    def dense(self, prepared: ColumnsWeight) -> Tensor:
        return prepared.columns.dense()

    borrow = dense

    def restore(self, prepared: ColumnsWeight) -> PackedTensor:
        return prepared.emptied.filled(prepared.columns.dense().contiguous())


COLUMNS = CpuColumns()
