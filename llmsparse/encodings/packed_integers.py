"""Integers of 4 or 8 bits packed into 32, as compressed-tensors stores them (`pack-quantized`; Kimi's experts, for one).

    X.weight_packed int32 (out, ⌈in·bits/32⌉), lowest bits first, each value plus 2^(bits−1)
    X.weight_scale (out, groups) · X.weight_shape (2,) · X.weight_zero_point int32 (⌈out·bits/32⌉, groups), packed
    alike along out, where the scheme is asymmetric · X.weight_g_idx (in,), the group of each column where they are
    not in order

w = s · (q − z), z being 0 where it is symmetric.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmsparse.encodings.protocol import Encoded, Found, Specs
from llmsparse.errors import CheckpointError

PARTS = {"packed": "_packed", "scale": "_scale", "zero_point": "_zero_point", "groups": "_g_idx", "shape": "_shape"}
WIDTHS = (4, 8)


def find(specs: Specs, block: Mapping[str, Any]) -> Found:
    """Every X.weight_packed, with what stands beside it."""
    found, widths = Found(), set(_widths(block))
    for key, spec in specs.items():
        if not key.endswith("weight_packed"):
            continue
        name = key.removesuffix("_packed")
        parts = {part: name + ending for part, ending in PARTS.items() if name + ending in specs}
        if "scale" not in parts or spec.dtype != torch.int32 or len(spec.shape) != 2 or not widths <= set(WIDTHS):
            raise CheckpointError(
                f"{spec.file}: {key} ({spec.dtype}, shape {list(spec.shape)}, {sorted(widths)} bits) is packed in a way that is "
                "not known; wanted int32 of two dimensions with a weight_scale beside it, of 4 or 8 bits"
            )
        if len(widths) != 1:
            raise CheckpointError(
                f"{spec.file}: {key} may have {sorted(widths)} bits a value; its config does not say which"
            )
        bits = next(iter(widths))
        shape = spec.shape[0], spec.shape[1] * 32 // bits
        found.weights[name] = Encoded(shape, parts, partial(_decode, shape=shape, bits=bits))
    return found


def _widths(block: Mapping[str, Any]) -> Iterator[int]:
    groups: Any = block.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") or {}
        if weights.get("type", "int") == "int" and "num_bits" in weights:
            yield int(weights["num_bits"])


def _decode(parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, int], bits: int) -> Tensor:
    """(out, in)."""
    out, width = shape
    if "shape" in parts and parts["shape"].flatten().tolist() != [out, width]:
        raise CheckpointError(
            f"a packed weight is {[out, width]} by its size and {parts['shape'].tolist()} by its record"
        )
    values = _unpacked(parts["packed"], bits).float()  # (out, in)
    scale = parts["scale"].float().reshape(out, -1)  # (out, groups)
    groups = parts.get("groups")
    if groups is None or bool((groups < 0).any()):
        groups = torch.arange(width) // -(-width // scale.shape[1])
    if "zero_point" in parts:
        zero = _unpacked(parts["zero_point"].T.contiguous(), bits).T[:out].float()  # (out, groups)
        values -= zero[:, groups.long()]
    return values.mul_(scale[:, groups.long()]).to(dtype)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """(rows, n) int32 → (rows, n·32/bits) int32, each from −2^(bits−1)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (packed[..., None] >> shifts) & (2**bits - 1)
    return values.flatten(-2) - 2 ** (bits - 1)
