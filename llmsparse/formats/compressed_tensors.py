"""Read the sparse checkpoints that compressed-tensors up to 0.14 wrote and later versions no longer open.

    sparse-bitmask       X.weight.shape int64 (2,) · X.weight.compressed dtype (nnz,) · X.weight.bitmask uint8
                         (out, ⌈in/8⌉) · X.weight.row_offsets int64 (out,), where each row begins in `compressed`
    sparse-24-bitmask    X.shape int64 (2, 1) · X.compressed dtype (out, in/2) · X.bitmask uint8 (out, ⌈in/8⌉)

Bit c % 8 of byte c // 8 is column c, as in our own format. Their config speaks of it in one of three blocks, as a
`sparsity_config` within it or as the block itself. Only reads; weights that are quantized as well are refused.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.formats.bitmask import Bitmask

BLOCKS = ("quantization_config", "compression_config", "sparsity_config")
KNOWN = ("sparse-bitmask", "sparse-24-bitmask")
PARTS = ("shape", "compressed", "bitmask", "row_offsets")  # the last one not in sparse-24-bitmask


def format_of(config: Mapping[str, Any]) -> str | None:
    """The format that a model's config names, or None."""
    for name in BLOCKS:
        block: Any = config.get(name)
        if not isinstance(block, dict):
            continue
        for sparsity in (block.get("sparsity_config"), block):
            if isinstance(sparsity, dict) and sparsity.get("format") in KNOWN:
                return str(sparsity["format"])
    return None


def without_blocks(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the dense checkpoint. CheckpointError where the weights are quantized too."""
    for name in BLOCKS:
        block: Any = config.get(name)
        if isinstance(block, dict) and block.get("config_groups"):
            raise CheckpointError(
                f"config.json: {name} quantizes the sparse weights too; only unquantized ones are read"
            )
    return {key: value for key, value in config.items() if key not in BLOCKS}


def find(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Name of each compressed weight → part → the tensor that holds it."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        base, _, part = key.rpartition(".")
        if part in PARTS:
            found.setdefault(base, {})[part] = key
    return {
        base if base.endswith(".weight") else f"{base}.weight": parts
        for base, parts in found.items()
        if set(PARTS[:3]) <= parts.keys()
    }


def shape_of(name: str, stored: Tensor) -> tuple[int, int]:
    """(out, in) as the part `shape` has it."""
    sizes = [int(size) for size in stored.flatten().tolist()]
    if len(sizes) != 2 or min(sizes) < 0:
        raise CheckpointError(f"{name}: its shape reads {sizes}, wanted two sizes; the file is damaged")
    return sizes[0], sizes[1]


def decode(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The dense weight (out, in). CheckpointError where values, bits and offsets disagree."""
    shape, values = shape_of(name, parts["shape"]), parts["compressed"].flatten()
    described = {
        "shape": list(shape),
        "dtype": str(values.dtype).removeprefix("torch."),
        "nnz": values.numel(),
        "pattern": "unstructured",
    }
    begins = parts.get("row_offsets")
    if begins is None:
        counts = Bitmask(values, parts["bitmask"], None, shape, "unstructured").keep().sum(-1)
        begins = counts.cumsum(0) - counts
    offsets = torch.cat((begins.flatten(), begins.new_tensor([values.numel()])))
    offsets = offsets.to(torch.int32 if values.numel() < 2**31 else torch.int64)
    return Bitmask.restore(name, described, {"": values, "_mask": parts["bitmask"], "_offsets": offsets}).unpack()
