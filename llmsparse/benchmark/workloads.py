"""What `bench` measures: the distinct weights of a model, or synthetic ones of the shapes of a model that is named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llmsparse.errors import RecipeError, did_you_mean
from llmsparse.formats import PackedTensor
from llmsparse.formats.bitmask import Bitmask
from llmsparse.models.origin import is_packed, read_config
from llmsparse.packing.folder import PackedCheckpoint
from llmsparse.packing.pack import select_packable
from llmsparse.runs.progress import Progress
from llmsparse.sparsity.patterns import NofM, parse_pattern

Shape = tuple[int, int]  # (out, in)

SHAPES: dict[str, dict[Shape, int]] = {  # of all linear weights in the blocks → how many there are
    "llama-3.2-1b": {(2048, 2048): 32, (512, 2048): 32, (8192, 2048): 32, (2048, 8192): 16},
    "llama-3.2-3b": {(3072, 3072): 56, (1024, 3072): 56, (8192, 3072): 56, (3072, 8192): 28},
    "llama-3-8b": {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32},
    "llama-3-70b": {(8192, 8192): 160, (1024, 8192): 160, (28672, 8192): 160, (8192, 28672): 80},
    "qwen3-4b": {(4096, 2560): 36, (2560, 4096): 36, (1024, 2560): 72, (9728, 2560): 72, (2560, 9728): 36},
    "qwen3-32b": {(8192, 5120): 64, (5120, 8192): 64, (1024, 5120): 128, (25600, 5120): 128, (5120, 25600): 64},
}


@dataclass(frozen=True)
class Workload:
    """A packed weight (out, in), on the CPU, that stands for `count` like it: the least sparse of them."""

    name: str
    count: int
    packed: PackedTensor


def of_model(folder: Path, trust_remote_code: bool, progress: Progress) -> list[Workload]:
    """One for each shape, dtype and pattern among a folder's packed weights, or those that packing it would pack.

    CheckpointError for a folder that is dense.
    """
    groups: dict[tuple[object, ...], Workload] = {}
    for name, packed in _weights(folder, trust_remote_code, progress):
        shape = packed.shape[-2:]  # (out, in)
        experts = math.prod(packed.shape[:-2])
        matrix = packed.rows(0, shape[0]) if len(packed.shape) > 2 else packed
        key = (shape, packed.FORMAT, packed.dtype, packed.pattern)
        before = groups.get(key)
        if before is None or before.packed.nnz < matrix.nnz:
            groups[key] = Workload(name, experts + (before.count if before else 0), matrix)
        else:
            groups[key] = Workload(before.name, before.count + experts, before.packed)
    return list(groups.values())


def of_shapes(named: str, sparsity: float, pattern: str, dtype: torch.dtype) -> list[Workload]:
    """Random weights of a model of SHAPES, or of shapes written out: `4096x14336,28672x8192` (out × in)."""
    parsed = parse_pattern(pattern, None if pattern != "unstructured" else sparsity, "row")
    workloads: list[Workload] = []
    for (out, width), count in _shapes(named).items():
        generator = torch.Generator().manual_seed(0)
        score = torch.rand(out, width, generator=generator)  # (out, in)
        parsed.check(f"{out}x{width}", (out, width))
        keep = parsed.keep(score, slice(0, width), width) if isinstance(parsed, NofM) else score >= sparsity
        weight = (score - 0.5).masked_fill_(~keep, 0).to(dtype)
        workloads.append(Workload(f"{out}x{width}", count, Bitmask.pack(weight, pattern, keep)))
    return workloads


def _shapes(named: str) -> dict[Shape, int]:
    if named in SHAPES:
        return SHAPES[named]
    shapes: dict[Shape, int] = {}
    for part in named.split(","):
        sizes = part.strip().lower().replace("×", "x").split("x")
        if len(sizes) != 2 or not all(size.isascii() and size.isdigit() and int(size) for size in sizes):
            raise RecipeError(f"--shapes {named!r}: neither OUTxIN,... nor a name{did_you_mean(named, list(SHAPES))}")
        shapes[int(sizes[0]), int(sizes[1])] = 1
    return shapes


def _weights(folder: Path, trust_remote_code: bool, progress: Progress) -> Iterator[tuple[str, PackedTensor]]:
    if is_packed(read_config(folder)):
        checkpoint = PackedCheckpoint(folder)
        for name in checkpoint.layers:
            yield name, checkpoint.weight(name)
        return
    with progress:
        selection = select_packable(folder, trust_remote_code, progress)
    for part in selection.packables:
        for name, tensor in selection.naming.to_module(selection.reader.read(part.group.keys)):
            described = part.layers.get(name)
            if described is not None:
                weight = tensor.mT if described.get("transposed") else tensor
                yield name, Bitmask.pack(weight, described["pattern"])
