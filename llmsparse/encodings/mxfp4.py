"""MXFP4, as gpt-oss stores its experts: 4-bit floats, and a power of two for every 32 of them.

    X_blocks uint8 (experts, out, in/32, 16), the earlier of two values in the low half of a byte
    X_scales uint8 (experts, out, in/32), the exponent plus 127

(Open Compute Project, Microscaling Formats 1.0.) The weight that the model has is X (experts, in, out).
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmsparse.encodings.protocol import Encoded, Found, Specs
from llmsparse.errors import CheckpointError

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the three low bits; the fourth is the sign
BIAS = 127


def find(specs: Specs, block: Mapping[str, Any]) -> Found:
    """Every pair X_blocks, X_scales."""
    found = Found()
    for key, spec in specs.items():
        if not key.endswith("_blocks") or spec.dtype != torch.uint8:
            continue
        name = key.removesuffix("_blocks")
        scales = f"{name}_scales"
        if scales not in specs:
            raise CheckpointError(f"{spec.file}: {key} has no {scales} beside it")
        if len(spec.shape) != 4 or spec.shape[-1] != 16 or specs[scales].shape != spec.shape[:-1]:
            raise CheckpointError(
                f"{spec.file}: {key} has shape {list(spec.shape)} and {scales} {list(specs[scales].shape)}, wanted (experts, "
                "out, groups, 16) and (experts, out, groups)"
            )
        experts, out, groups = spec.shape[:3]
        found.weights[name] = Encoded((experts, groups * 32, out), {"blocks": key, "scales": scales}, _decode)
    return found


def _decode(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """(experts, in, out), one expert at a time; every value is exact in bf16."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)])
    both = torch.stack([table.repeat(16), table.repeat_interleave(16)], 1)  # byte → its low and its high value
    experts, out, groups = parts["scales"].shape
    weight = torch.empty(experts, groups * 32, out, dtype=dtype)
    for expert, (blocks, scales) in enumerate(zip(parts["blocks"], parts["scales"], strict=True)):
        values = both[blocks.int()].view(out, groups, 32)
        weight[expert] = torch.ldexp(values, scales.int()[..., None] - BIAS).view(out, groups * 32).T
    return weight
