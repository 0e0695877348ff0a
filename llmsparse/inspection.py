"""What a checkpoint holds, dense or packed: sparsity, pattern and bytes of every weight, read one tensor at a time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse import source
from llmsparse.checkpoint import CheckpointReader
from llmsparse.errors import CheckpointError
from llmsparse.footprint import NARROW, WIDE, compared
from llmsparse.packed import PackedCheckpoint
from llmsparse.patterns import PATTERNS

if TYPE_CHECKING:
    from rich.console import RenderableType

SPARSE = 0.05  # below this fraction of zeros a weight counts as dense


@dataclass(frozen=True)
class WeightInfo:
    """One tensor of two or more dimensions; a packed one has the shape of what is packed, (..., out, in)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int  # as stored
    sparsity: float
    pattern: str  # dense, unstructured, or N:M
    dense_bytes: int
    packed: bool = False


@dataclass(frozen=True)
class Inspection:
    """What `llmsparse inspect` shows. Totals count every tensor, one-dimensional ones too."""

    model: str
    weights: list[WeightInfo]
    parameters: int
    bytes: int
    zeros: int
    embedding_parameters: int
    embedding_zeros: int
    dense_bytes: int  # of the same tensors, none of them packed
    verified: bool = False  # checksums and counts were found right

    @property
    def packed(self) -> list[WeightInfo]:
        return [weight for weight in self.weights if weight.packed]

    @property
    def sparsity(self) -> float:
        return self.zeros / max(1, self.parameters)

    @property
    def sparsity_without_embeddings(self) -> float:
        return (self.zeros - self.embedding_zeros) / max(1, self.parameters - self.embedding_parameters)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "sparsity": self.sparsity,
            "sparsity_without_embeddings": self.sparsity_without_embeddings,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "packed_bytes": sum(weight.bytes for weight in self.packed),
            "packed_dense_bytes": sum(weight.dense_bytes for weight in self.packed),
            "verified": self.verified,
            "weights": [asdict(weight) for weight in self.weights],
        }

    def table(self) -> RenderableType:
        from rich.table import Table

        sizes = ("packed MB", "dense MB", "ratio") if self.packed else ("MB",)
        table = Table("weight", "shape", "dtype", "sparsity", "pattern", *sizes, box=None, pad_edge=False)
        for weight in self.weights:
            shape = "×".join(map(str, weight.shape))
            dense, ratio = f"{weight.dense_bytes / 1e6:.2f}", f"{weight.bytes / max(1, weight.dense_bytes):.3f}"
            size = (f"{weight.bytes / 1e6:.2f}" if weight.packed else "", dense, ratio if weight.packed else "")
            cells = size if self.packed else (dense,)
            table.add_row(weight.name, shape, weight.dtype, f"{weight.sparsity:.4f}", weight.pattern, *cells)
        table.caption = "\n".join(self._totals())
        table.caption_justify = "left"
        return table

    def _totals(self) -> list[str]:
        size = compared(self.bytes, self.dense_bytes) if self.packed else f"{self.bytes / 1e6:.1f} MB"
        lines = [
            f"{self.parameters:,} parameters, {size}; sparsity {self.sparsity:.4f} of all, "
            f"{self.sparsity_without_embeddings:.4f} without embeddings and head"
        ]
        if self.packed:
            packed = compared(sum(w.bytes for w in self.packed), sum(w.dense_bytes for w in self.packed))
            lines.append(f"packed: {len(self.packed)} weights, {packed}")
            if any(weight.shape[-1] < WIDE for weight in self.packed):
                lines.append(NARROW)
        if self.verified:
            lines.append("verified: mask and offsets of every packed weight, sha256 of every file")
        return lines


def inspect(model: str, *, revision: str | None = None, verify: bool = False) -> Inspection:
    """Read every tensor of `model` (a folder or hub id) once and say how sparse it is.

    `verify` first checks a packed checkpoint: mask and offsets of every weight, the checksum of every file. Raises
    CheckpointError where one is wrong, and for a checkpoint that is not packed, which holds none.
    """
    folder = source.resolve(model, revision)
    packed = _packed(folder)
    if verify and packed is None:
        raise CheckpointError(f"{folder}: not packed, so it holds no checksums to verify")
    if packed is not None and verify:
        packed.verify()
    reader = packed.reader if packed is not None else CheckpointReader(folder)
    weights: list[WeightInfo] = []
    parameters = zeros = embedding_parameters = embedding_zeros = dense_bytes = 0
    for key in [*packed.layers, *packed.plain_keys] if packed is not None else reader.keys():
        tensor = reader.read([key])[key]
        if packed is not None and key in packed.layers:
            info, numel = _packed_info(packed, key, tensor), math.prod(packed.layers[key]["shape"])
        else:
            info, numel = _info(key, tensor), tensor.numel()
        zero = round(info.sparsity * numel)
        parameters += numel
        dense_bytes += info.dense_bytes
        zeros += zero
        if _is_embedding(key):
            embedding_parameters += numel
            embedding_zeros += zero
        if len(info.shape) >= 2:
            weights.append(info)
    stored = sum(spec.end - spec.begin for spec in map(reader.spec, reader.keys()))
    return Inspection(
        str(model), weights, parameters, stored, zeros, embedding_parameters, embedding_zeros, dense_bytes, verify
    )


def _info(key: str, tensor: Tensor) -> WeightInfo:
    sparsity = (tensor.numel() - int(torch.count_nonzero(tensor))) / max(1, tensor.numel())
    pattern = pattern_of(tensor, sparsity) if tensor.dim() >= 2 else "dense"
    return WeightInfo(
        key.removesuffix(".weight"),
        tuple(tensor.shape),
        str(tensor.dtype).removeprefix("torch."),
        tensor.nbytes,
        sparsity,
        pattern,
        tensor.nbytes,
    )


def _packed_info(packed: PackedCheckpoint, name: str, values: Tensor) -> WeightInfo:
    described = packed.layers[name]
    numel = math.prod(described["shape"])
    return WeightInfo(
        name.removesuffix(".weight"),
        tuple(described["shape"]),
        described["dtype"],
        packed.stored_bytes(name),
        (numel - int(torch.count_nonzero(values))) / max(1, numel),
        described["pattern"],
        numel * values.element_size(),
        packed=True,
    )


def _packed(folder: Path) -> PackedCheckpoint | None:
    """A folder without a config is looked at all the same."""
    is_packed = (folder / "config.json").is_file() and source.is_packed(source.read_config(folder))
    return PackedCheckpoint(folder) if is_packed else None


def pattern_of(weight: Tensor, sparsity: float) -> str:
    """The narrowest N:M that every group of consecutive inputs obeys, else unstructured, else dense.

    Inputs are the last dimension, or the one before it where the module stores (in, out).
    """
    if sparsity < SPARSE:
        return "dense"
    kept = weight != 0
    for n, m in PATTERNS:
        for view in (kept, kept.transpose(-1, -2)):
            if view.shape[-1] % m == 0 and not (view.unflatten(-1, (-1, m)).sum(dim=-1) > n).any():
                return f"{n}:{m}"
    return "unstructured"


def _is_embedding(key: str) -> bool:
    return any(part in key for part in ("embed", "wte", "wpe", "lm_head"))
