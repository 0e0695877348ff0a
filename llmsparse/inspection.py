"""What a checkpoint holds: sparsity, pattern and bytes of every weight, read one tensor at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse import source
from llmsparse.checkpoint import CheckpointReader
from llmsparse.patterns import PATTERNS

if TYPE_CHECKING:
    from rich.console import RenderableType

SPARSE = 0.05  # below this fraction of zeros a weight counts as dense


@dataclass(frozen=True)
class WeightInfo:
    """One tensor of two or more dimensions."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sparsity: float
    pattern: str  # dense, unstructured, or N:M


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
            "weights": [asdict(weight) for weight in self.weights],
        }

    def table(self) -> RenderableType:
        from rich.table import Table

        table = Table("weight", "shape", "dtype", "sparsity", "pattern", "MB", box=None, pad_edge=False)
        for weight in self.weights:
            shape = "×".join(map(str, weight.shape))
            table.add_row(
                weight.name, shape, weight.dtype, f"{weight.sparsity:.4f}", weight.pattern, f"{weight.bytes / 1e6:.2f}"
            )
        table.caption = (
            f"{self.parameters:,} parameters, {self.bytes / 1e6:.1f} MB; sparsity {self.sparsity:.4f} of all, "
            f"{self.sparsity_without_embeddings:.4f} without embeddings and head"
        )
        table.caption_justify = "left"
        return table


def inspect(model: str, *, revision: str | None = None) -> Inspection:
    """Read every tensor of `model` (a folder or hub id) once and say how sparse it is."""
    reader = CheckpointReader(source.resolve(model, revision))
    weights: list[WeightInfo] = []
    parameters = total_bytes = zeros = embedding_parameters = embedding_zeros = 0
    for key in reader.keys():
        tensor = reader.read([key])[key]
        zero = tensor.numel() - int(torch.count_nonzero(tensor))
        parameters += tensor.numel()
        total_bytes += tensor.nbytes
        zeros += zero
        if _is_embedding(key):
            embedding_parameters += tensor.numel()
            embedding_zeros += zero
        if tensor.dim() >= 2:
            sparsity = zero / max(1, tensor.numel())
            dtype = str(tensor.dtype).removeprefix("torch.")
            name = key.removesuffix(".weight")
            weights.append(
                WeightInfo(name, tuple(tensor.shape), dtype, tensor.nbytes, sparsity, pattern_of(tensor, sparsity))
            )
    return Inspection(str(model), weights, parameters, total_bytes, zeros, embedding_parameters, embedding_zeros)


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
