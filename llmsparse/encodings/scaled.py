"""Weights in 8-bit floats or integers, times a scale: for the whole tensor, for every row, or for every block.

    X.weight float8 or int8 (out, in) · X.weight_scale_inv or X.weight_scale: one number, (out,), (out, 1) or
    (⌈out/b₀⌉, ⌈in/b₁⌉), where the config has `weight_block_size: [b₀, b₁]`

DeepSeek's and Qwen's FP8 checkpoints (`weight_scale_inv`, which despite its name is multiplied with), Mistral's, and the
`float-quantized` and `int-quantized` ones of compressed-tensors. Experts held as one tensor have a leading dimension.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmsparse.encodings.protocol import Encoded, Found, Specs
from llmsparse.errors import CheckpointError

STORED = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int8}
SCALES = ("_scale_inv", "_scale")
OF_ACTIVATIONS = ("activation_scale", "input_scale", "output_scale", "k_scale", "v_scale", "q_scale")


def find(specs: Specs, block: Mapping[str, Any]) -> Found:
    """Every float8 or int8 tensor that has a scale beside it."""
    sizes = block.get("weight_block_size") or _block_structure(block)
    found = Found()
    for key, spec in specs.items():
        if key.endswith(OF_ACTIVATIONS):
            found.dropped.add(key)
        if spec.dtype not in STORED:
            continue
        scale = next((key + ending for ending in SCALES if key + ending in specs), None)
        if scale is None:
            raise CheckpointError(f"{spec.file}: {key} is stored in {spec.dtype} and has no scale beside it")
        grid = _grid(key, spec.shape, specs[scale].shape, sizes)
        found.weights[key] = Encoded(spec.shape, {"weight": key, "scale": scale}, partial(_decode, grid=grid))
    return found


def _block_structure(block: Mapping[str, Any]) -> Any:
    """compressed-tensors' name for the size of a block."""
    groups: Any = block.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if (size := (group.get("weights") or {}).get("block_structure")) is not None:
            return size
    return None


def _grid(key: str, shape: tuple[int, ...], scale: tuple[int, ...], sizes: Any) -> tuple[int, ...]:
    """How many entries of the weight one scale stands for, along each dimension."""
    if math.prod(scale) == 1:
        return shape
    if len(scale) == 1:  # one a row, or one an expert
        scale = scale + (1,) * (len(shape) - 1)
    grid: list[int] = []
    for place, (size, count) in enumerate(zip(shape, scale, strict=False)):
        inner = place - (len(shape) - 2)  # −1 for the dimension of experts
        block = size if count == 1 else 1 if count == size else sizes[inner] if sizes and inner >= 0 else 0
        if block < 1 or -(-size // block) != count:
            raise CheckpointError(
                f"{key}: has shape {list(shape)} and scales of shape {list(scale)}, which do not fit weight_block_size {sizes}"
            )
        grid.append(block)
    if len(scale) != len(shape):
        raise CheckpointError(f"{key}: has shape {list(shape)} and scales of shape {list(scale)}")
    return tuple(grid)


def _decode(parts: Mapping[str, Tensor], dtype: torch.dtype, grid: tuple[int, ...]) -> Tensor:
    """w = q · s, each scale spread over its block; experts one at a time."""
    stored, scale = parts["weight"], parts["scale"].float()
    scale = scale.reshape([-(-size // block) for size, block in zip(stored.shape, grid, strict=True)])
    if stored.dim() < 3:
        return _spread(stored, scale, grid).to(dtype)
    weight = torch.empty(stored.shape, dtype=dtype)
    for expert, matrix in enumerate(stored):
        weight[expert] = _spread(matrix, scale[expert if len(scale) > 1 else 0], grid[1:])
    return weight


def _spread(stored: Tensor, scale: Tensor, grid: tuple[int, ...]) -> Tensor:
    for place, block in enumerate(grid):
        if block not in (1, stored.shape[place]):
            scale = scale.repeat_interleave(block, place).narrow(place, 0, stored.shape[place])
    return stored.float().mul_(scale)
