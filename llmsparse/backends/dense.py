"""Dense products: `dense` unpacks once and keeps the weight, `dense-lowmem` keeps it packed and unpacks at every call.

`dense` gives the bits that the zero-filled model gives, at its speed and in its memory. `dense-lowmem` needs the memory
of the packed weight and of one block of rows, and is slow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmsparse.backends.protocol import WeightSpec
from llmsparse.formats import PackedTensor

BLOCK = 2**22  # weights unpacked at a time: 8 MB in bf16, which stays in most caches


@dataclass(frozen=True)
class DenseWeight:
    """A weight, and what tells how it was packed: a kept zero must be found again when the model is saved."""

    weight: Tensor  # (..., out, in)
    emptied: PackedTensor


class Dense:
    name = "dense"
    formats = None
    compiles = True
    exact = True

    def why_not(self, spec: WeightSpec) -> str | None:
        return None

    def wrong(self, device: torch.device) -> str | None:
        return None

    def tokens(self, spec: WeightSpec) -> int | None:
        return None

    def prepare(self, packed: PackedTensor, spec: WeightSpec) -> DenseWeight:
        return DenseWeight(laid_out(packed.unpack(), spec.transposed), packed.emptied())

    def run(self, prepared: DenseWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, prepared.weight, bias)

    def dense(self, prepared: DenseWeight) -> Tensor:
        return prepared.weight

    borrow = dense

    def restore(self, prepared: DenseWeight) -> PackedTensor:
        return prepared.emptied.filled(prepared.weight)


@dataclass(frozen=True)
class KeptPacked:
    """A packed weight as it is, and the same in blocks of rows: where each begins is read once, since on a GPU every look
    into a tensor waits for all that was asked of it before."""

    packed: PackedTensor
    transposed: bool
    blocks: list[tuple[slice, PackedTensor]]  # they share its memory; none of a stack, which only `dense` reads


class DenseLowMemory:
    name = "dense-lowmem"
    formats = None
    compiles = True
    exact = True

    def why_not(self, spec: WeightSpec) -> str | None:
        return None

    def wrong(self, device: torch.device) -> str | None:
        return None

    def tokens(self, spec: WeightSpec) -> int | None:
        return None

    def prepare(self, packed: PackedTensor, spec: WeightSpec) -> KeptPacked:
        blocks: list[tuple[slice, PackedTensor]] = []
        if len(packed.shape) == 2:
            out, width = packed.shape
            step = max(1, BLOCK // max(1, width * packed.tile_rows)) * packed.tile_rows
            starts = range(0, max(1, out), step)
            blocks = [(slice(at, min(at + step, out)), packed.rows(at, min(at + step, out))) for at in starts]
        return KeptPacked(packed, spec.transposed, blocks)

    def run(self, prepared: KeptPacked, x: Tensor, bias: Tensor | None) -> Tensor:
        parts = [
            functional.linear(x, block.unpack(), None if bias is None else bias[rows])
            for rows, block in prepared.blocks
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def dense(self, prepared: KeptPacked) -> Tensor:
        return laid_out(prepared.packed.unpack(), prepared.transposed)

    borrow = dense

    def restore(self, prepared: KeptPacked) -> PackedTensor:
        return prepared.packed


def laid_out(weight: Tensor, transposed: bool) -> Tensor:
    """(..., out, in), in memory as the module keeps it: the bits of a product depend on the order of its operands."""
    return weight.transpose(-1, -2).contiguous().transpose(-1, -2) if transposed else weight
