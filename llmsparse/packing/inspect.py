"""What a checkpoint holds, dense or packed: sparsity, pattern and bytes of every weight, read one tensor at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.formats import format_of
from llmsparse.formats.nested import Nested, entropy_of
from llmsparse.models.origin import fetch_model, is_packed, read_config
from llmsparse.models.streamed import StreamedModel
from llmsparse.packing.folder import PackedCheckpoint
from llmsparse.packing.report import NARROW, WIDE, compared
from llmsparse.sparsity.patterns import PATTERNS, SPARSE
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.pickled import open_stored

if TYPE_CHECKING:
    from rich.console import RenderableType

FULL = 0.95  # of the places an N:M may keep: where so many are kept, it is what made the zeros
GROUPS = (2, 4, 8, 16, 32)  # M that is looked for


@dataclass(frozen=True)
class WeightInfo:
    """One tensor of two or more dimensions; a packed one has the shape of what is packed, (..., out, in)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int  # as stored
    sparsity: float
    pattern: str  # dense, unstructured, or N:M along the inputs
    dense_bytes: int
    packed: bool = False
    entropy: float | None = None  # of the numbers of a nested weight, in bits
    parts: dict[str, int] | None = None  # of one: bytes of what is stored, by what it says


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
    note: str | None = None

    @property
    def packed(self) -> list[WeightInfo]:
        return [weight for weight in self.weights if weight.packed]

    @property
    def coded(self) -> list[WeightInfo]:
        """Those that are stored as small integers."""
        return [weight for weight in self.weights if weight.parts]

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
            "note": self.note,
            "weights": [asdict(weight) for weight in self.weights],
        }

    def table(self) -> RenderableType:
        from rich.table import Table

        sizes = ("packed MB", "dense MB", "ratio") if self.packed else ("MB",)
        coded = ("bits", "entropy") if self.coded else ()
        table = Table("weight", "shape", "dtype", "sparsity", "pattern", *coded, *sizes, box=None, pad_edge=False)
        for weight in self.weights:
            shape = "×".join(map(str, weight.shape))
            dense, ratio = f"{weight.dense_bytes / 1e6:.2f}", f"{weight.bytes / max(1, weight.dense_bytes):.3f}"
            size = (f"{weight.bytes / 1e6:.2f}" if weight.packed else "", dense, ratio if weight.packed else "")
            cells = size if self.packed else (dense,)
            bits, entropy = f"{8 * weight.bytes / max(1, prod(weight.shape)):.3f}", f"{weight.entropy or 0:.3f}"
            few = ((bits, entropy) if weight.parts else ("", "")) if coded else ()
            table.add_row(weight.name, shape, weight.dtype, f"{weight.sparsity:.4f}", weight.pattern, *few, *cells)
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
            if any(weight.shape[-1] < WIDE and not weight.parts for weight in self.packed):
                lines.append(NARROW)
        if self.coded:
            lines.append(self._by_part())
        if self.verified:
            lines.append("verified: mask and offsets of every packed weight, sha256 of every file")
        return [*lines, self.note] if self.note else lines

    def _by_part(self) -> str:
        """Where the bits of nested weights go, and how near they are to the least."""
        numel = sum(prod(weight.shape) for weight in self.coded)
        parts = Counter[str]()
        for weight in self.coded:
            parts.update(weight.parts or {})
        bits = {part: 8 * size / numel for part, size in parts.items() if size}
        entropy = sum((weight.entropy or 0) * prod(weight.shape) for weight in self.coded) / numel
        numbers = sum(share for part, share in bits.items() if part not in ("steps", "tiles"))
        listed = ", ".join(f"{part} {share:.3f}" for part, share in bits.items())
        return (
            f"nested: {len(self.coded)} weights, {sum(bits.values()):.3f} bits each ({listed}); numbers take {numbers:.3f}, "
            f"their entropy is {entropy:.3f}"
        )


def inspect(model: str, *, revision: str | None = None, verify: bool = False) -> Inspection:
    """Read every tensor of `model` (a folder or hub id) once and say how sparse it is.

    `verify` first checks a packed checkpoint: mask and offsets of every weight, the checksum of every file. Raises
    CheckpointError where one is wrong, and for a checkpoint that is not packed, which holds none.
    """
    folder = fetch_model(model, revision)
    packed = _packed(folder)
    if verify and packed is None:
        raise CheckpointError(f"{folder}: not packed, so it holds no checksums to verify")
    if packed is not None and verify:
        packed.verify()
    reader = packed.reader if packed is not None else open_stored(folder)
    layout = _Layout(reader)
    weights: list[WeightInfo] = []
    parameters = zeros = embedding_parameters = embedding_zeros = dense_bytes = 0
    for key in [*packed.layers, *packed.plain_keys] if packed is not None else reader.keys():
        tensor = reader.read([key])[key]
        if packed is not None and key in packed.layers:
            info, numel = _packed_info(packed, key, tensor), prod(packed.layers[key]["shape"])
        else:
            info, numel = _info(key, tensor, layout), tensor.numel()
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
    totals = (parameters, stored, zeros, embedding_parameters, embedding_zeros, dense_bytes)
    note = f"N:M is counted along the last dimension, which the model could not confirm: {layout.unknown}"
    return Inspection(str(model), weights, *totals, verified=verify, note=note if layout.unknown else None)


def _info(key: str, stored: Tensor, layout: _Layout) -> WeightInfo:
    coded = stored.is_floating_point() and stored.dtype.itemsize == 1
    tensor = stored.float() if coded else stored  # torch counts nothing in 8-bit floats
    sparsity = (tensor.numel() - int(torch.count_nonzero(tensor))) / max(1, tensor.numel())
    pattern = layout.pattern(key, tensor, sparsity) if tensor.dim() >= 2 else "dense"
    return WeightInfo(
        key.removesuffix(".weight"),
        tuple(tensor.shape),
        str(stored.dtype).removeprefix("torch."),
        stored.nbytes,
        sparsity,
        pattern,
        stored.nbytes,
    )


def _packed_info(packed: PackedCheckpoint, name: str, values: Tensor) -> WeightInfo:
    described = packed.layers[name]
    numel = prod(described["shape"])
    if format_of(described) is Nested:
        weight = packed.weight(name)
        assert isinstance(weight, Nested)
        q = weight.numbers()
        return WeightInfo(
            name.removesuffix(".weight"),
            weight.shape,
            described["dtype"],
            packed.stored_bytes(name),
            1 - int(q.count_nonzero()) / max(1, numel),
            weight.pattern,
            numel * weight.dtype.itemsize,
            packed=True,
            entropy=entropy_of(q),
            parts=weight.parts(),
        )
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
    packed = (folder / "config.json").is_file() and is_packed(read_config(folder))
    return PackedCheckpoint(folder) if packed else None


def pattern_of(weight: Tensor, sparsity: float) -> str:
    """What is true of the zeros of a weight (..., out, in), in one word, the tightest that can be said:

    1. `dense` below 5 % of zeros;
    2. N:M where each M consecutive inputs keep at most N and almost all of these are kept, so that the pattern accounts
       for the zeros: the one with the smallest N/M, of equal ones the one with the smallest M (a 1:2 is a 2:4 and a 4:8,
       too), for M of 2, 4, 8, 16 and 32;
    3. else the narrowest of 1:8, 1:4, 2:8, 2:4 and 4:8, which packing stores, that holds: there are more zeros still;
    4. else `unstructured`.
    """
    if sparsity < SPARSE:
        return "dense"
    most = _most_kept(weight != 0)
    full = [(n / m, m, n) for m, n in most.items() if n < m and 1 - sparsity >= FULL * n / m]
    if full:
        _, m, n = min(full)
        return f"{n}:{m}"
    return next((f"{n}:{m}" for n, m in PATTERNS if most.get(m, m) <= n), "unstructured")


def _most_kept(kept: Tensor) -> dict[int, int]:
    """M → the most that M consecutive places of the last dimension keep anywhere, for each M that divides it."""
    most: dict[int, int] = {}
    counts = kept.to(torch.uint8)
    for size in GROUPS:
        if counts.shape[-1] % 2:
            break
        counts = counts[..., ::2] + counts[..., 1::2]  # (..., out, in / size)
        most[size] = int(counts.max()) if counts.numel() else 0
    return most


class _Layout:
    """Which weights a module stores as (in, out). Asked of the model only where it decides what a pattern is called."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self.unknown: str | None = None  # why it cannot be told

    @cached_property
    def _inputs_first(self) -> set[str]:
        """On-disk keys; none where the model cannot be built."""
        try:
            model = StreamedModel(self._reader, device=torch.device("cpu"), dtype=torch.float32)
        except CheckpointError as error:
            self.unknown = str(error)
            return set()
        weights = [weight for index in range(len(model.block_names)) for weight in model.weights(index)]
        return {weight.key for weight in [*weights, *model.head_weights()] if weight.transposed}

    def pattern(self, key: str, tensor: Tensor, sparsity: float) -> str:
        """The pattern along the inputs of the module, whatever the order on disk."""
        last, other = pattern_of(tensor, sparsity), pattern_of(tensor.mT, sparsity)
        return last if last == other or key not in self._inputs_first else other


def _is_embedding(key: str) -> bool:
    return any(part in key for part in ("embed", "wte", "wpe", "lm_head"))
