"""`cusparselt`: NVIDIA's own 2:4 products through torch, for many tokens at once.

It pads activations to 16 rows and more, so that a decode step gains nothing; what its layout is depends on the GPU, so
the weight is packed for it at load and never stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmsparse.backends.protocol import WeightSpec
from llmsparse.formats.bitmask import Bitmask

TILE = 64  # rows and columns must be multiples of it


@dataclass(frozen=True)
class SemiStructured:
    """torch's sparse tensor, and which places are stored."""

    weight: Tensor
    places: Bitmask  # emptied


class CuSparseLt:
    name = "cusparselt"
    formats = ("bitmask",)
    compiles = True
    exact = True

    def why_not(self, spec: WeightSpec) -> str | None:
        if spec.device.type != "cuda":
            return f"needs an NVIDIA GPU; the device is {spec.device}"
        if spec.pattern != "2:4":
            return f"for 2:4 weights, this one is {spec.pattern}"
        if not torch.backends.cusparselt.is_available():
            return "this torch is built without cuSPARSELt"
        if torch.cuda.get_device_capability(spec.device) < (8, 0):
            return "the GPU has no sparse tensor cores (compute capability 8.0 and up)"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"for float16 and bfloat16, this weight is {str(spec.dtype).removeprefix('torch.')}"
        if any(size % TILE for size in spec.shape[-2:]):
            return f"rows and columns must be multiples of {TILE}, this weight is {list(spec.shape)}"
        return None

    def wrong(self, device: torch.device) -> str | None:
        return None

    def tokens(self, spec: WeightSpec) -> int | None:
        return None

    def prepare(self, packed: Bitmask, spec: WeightSpec) -> SemiStructured:
        return SemiStructured(torch.sparse.to_sparse_semi_structured(packed.unpack()), packed.emptied())

    def run(self, prepared: SemiStructured, x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, prepared.weight, bias)

    def dense(self, prepared: SemiStructured) -> Tensor:
        return prepared.weight.to_dense()

    borrow = dense

    def restore(self, prepared: SemiStructured) -> Bitmask:
        return prepared.places.filled(self.dense(prepared))
