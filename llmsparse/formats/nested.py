"""Format "nested": small integers and a step a row, W = step · q, where many q are 0 and most others are ±1.

    stream    uint8 (bytes,)                     q, tile by tile in the digits of a code (digits.py)
    steps     bfloat16 (rows, ⌈in/group⌉)        rows = all leading dimensions × out; on disk once for `step_rows` rows
    tiles     int32 or int64 (matrices·tiles + 1,)  where each tile of rows begins in the stream; matrices = leading dimensions

Zeros cost next to nothing beside the others without a mask of their own: the code is chosen for each weight so that its
bits come near the entropy of its numbers, and it can be read forward, a tile of rows at a time.

A product step · q is exact in float32, since a step has 8 bits and q has 7; it is rounded once, to the dtype of the weight.

docs/packed-format.md specifies it for whoever writes a reader.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.formats.bitmask import check_dtype
from llmsparse.formats.digits import Code, DamagedStream, decode, encode, nonzeros, sizes
from llmsparse.formats.protocol import Layout
from llmsparse.formats.shortest import histogram, shortest_code

TILE = (
    2**16
)  # places of a tile, at least, where a matrix has so many: what a tile begins with costs nothing beside them
TILE_ROWS = 16  # a tile has a multiple of these, unless it is a whole matrix
ROUNDED = ("float32", "bfloat16", "float16")  # what step · q may be rounded to
STEPS = torch.bfloat16
TENSORS = ("stream", "steps", "tiles")
CHUNK = 2**22  # weights unpacked at a time


@dataclass(frozen=True)
class Nested:
    """A weight of `shape` (..., out, in), as small integers."""

    FORMAT: ClassVar[str] = "nested"
    SINCE: ClassVar[int] = 2
    MARK: ClassVar[tuple[str, torch.dtype]] = ("_steps", STEPS)
    SUFFIXES: ClassVar[tuple[str, ...]] = ("", "_steps", "_tiles")

    stream: Tensor
    steps: Tensor
    tiles: Tensor
    shape: tuple[int, ...]
    code: Code
    tile_rows: int
    group: int  # columns that share a step
    nnz: int  # numbers other than 0
    stored: torch.dtype  # that step · q is rounded to
    dtype: torch.dtype  # of what `unpack` makes; it rounds to `stored` all the same
    pattern: str = "unstructured"
    step_rows: int = 1  # that share their steps, and have them on disk once

    @classmethod
    def encode(cls, q: Tensor, steps: Tensor, dtype: torch.dtype) -> Self:
        """int8 numbers (..., out, in) and bfloat16 steps (rows, groups) on the CPU → the shortest that the format has."""
        code, _ = shortest_code(q.numpy())
        *_, out, width = q.shape
        tile = max(1, min(out, -(-TILE // max(1, TILE_ROWS * width)) * TILE_ROWS))
        group = -(-width // steps.shape[1]) if steps.shape[1] else max(1, width)
        together = rows_sharing(steps) if q.ndim == 2 else 1
        return replace(cls.written(q, steps, code, tile, group, dtype), step_rows=together)

    @classmethod
    def written(cls, q: Tensor, steps: Tensor, code: Code, tile: int, group: int, dtype: torch.dtype) -> Self:
        """As `encode`, by a code and in tiles that are given, and every row with steps of its own."""
        parts: list[bytes] = []
        for rows in _tile_slices(tuple(q.shape), tile):
            parts.append(encode(q.reshape(-1, q.shape[-1])[rows].numpy().reshape(-1), code))
        ends = np.cumsum([0, *map(len, parts)])
        stream = torch.from_numpy(np.frombuffer(b"".join(parts), np.uint8).copy())
        tiles = torch.from_numpy(ends.astype(np.int32 if ends[-1] < 2**31 else np.int64))
        return cls(stream, steps, tiles, tuple(q.shape), code, tile, group, int(q.count_nonzero()), dtype, dtype)

    @property
    def device(self) -> torch.device:
        return self.stream.device

    def numbers(self) -> Tensor:
        """q, int8 (..., out, in), on the CPU. CheckpointError where the stream is damaged."""
        width = self.shape[-1]
        q = np.empty((math.prod(self.shape[:-1]), width), np.int8)
        for rows, data in self._tiles():
            try:
                q[rows] = decode(data, (rows.stop - rows.start) * width, self.code).reshape(-1, width)
            except DamagedStream as error:
                raise CheckpointError(f"the numbers of rows {rows.start} to {rows.stop}: {error}") from error
        return torch.from_numpy(q).view(self.shape)

    def unpack(self) -> Tensor:
        """step · q in float32, rounded to `stored`: (..., out, in) in `dtype`, on the device of the stream."""
        width, q = self.shape[-1], self.numbers().to(self.device)
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        into, numbers, some = weight.view(-1, width), q.view(-1, width), max(1, CHUNK // max(1, width))
        for start in range(0, len(numbers), some):
            steps = self.steps[start : start + some].float().repeat_interleave(self.group, dim=1)[:, :width]
            into[start : start + some] = (numbers[start : start + some] * steps).to(self.stored)
        return weight

    def parts(self) -> dict[str, int]:
        """Bytes of what is stored, by what it says."""
        width = self.shape[-1]
        tiles = (sizes(data, (rows.stop - rows.start) * width, self.code) for rows, data in self._tiles())
        levels = [sum(level) for level in zip(*tiles, strict=True)] or [0] * len(self.code.digits)
        first = "mask" if self.code.digits[0] == 1 else "first digits"
        return {
            first: levels[0],
            "signs": sum(levels[1:2]),
            "planes": sum(levels[2:]),
            "steps": self.steps.nbytes // self.step_rows,
            "tiles": self.tiles.nbytes,
        }

    def entropy(self) -> float:
        """Bits a number that no code for single numbers goes below."""
        return entropy_of(self.numbers())

    def tensors(self) -> dict[str, Tensor]:
        steps = self.steps if self.step_rows == 1 else self.steps[:: self.step_rows].contiguous()
        return dict(zip(self.SUFFIXES, (self.stream, steps, self.tiles), strict=True))

    def describe(self) -> dict[str, Any]:
        shared = {"step_rows": self.step_rows} if self.step_rows > 1 else {}
        return shared | {
            "format": self.FORMAT,
            "shape": list(self.shape),
            "dtype": str(self.stored).removeprefix("torch."),
            "nnz": self.nnz,
            "bytes": self.stream.numel(),
            "digits": list(self.code.digits),
            "fours": sorted(self.code.fours),
            "tile": self.tile_rows,
            "group": self.group,
        }

    @classmethod
    def check(cls, name: str, described: Mapping[str, Any]) -> None:
        shape: Any = described.get("shape")
        counts = [described.get(key) for key in ("nnz", "bytes", "tile", "group")]
        fits = isinstance(shape, list) and len(shape) > 1 and _whole([*shape, *counts]) and 0 not in counts[2:]
        if not fits or int(counts[3] or 0) > max(1, shape[-1]):
            raise CheckpointError(
                f"{name}: shape {shape!r}, nnz, bytes, tile and group {counts!r}: wanted two or more sizes and four counts"
            )
        together: Any = described.get("step_rows", 1)
        single = (
            _whole([together]) and together > 0 and shape[-2] % together == 0 and (together == 1 or len(shape) == 2)
        )
        if not single:
            raise CheckpointError(f"{name}: step_rows {together!r}: wanted a divisor of the rows of a single matrix")
        check_dtype(name, described)
        if described["dtype"] not in ROUNDED:
            raise CheckpointError(
                f"{name}: dtype {described['dtype']!r}: wanted {', '.join(ROUNDED)} for numbers in few bits"
            )
        digits, fours = described.get("digits"), described.get("fours")
        if not isinstance(digits, list) or not isinstance(fours, list) or not _whole([*digits, *fours]):
            raise CheckpointError(f"{name}: digits {digits!r}, fours {fours!r}: wanted two lists of whole numbers")
        problem = Code(tuple(digits), frozenset(fours)).problem()
        if problem:
            raise CheckpointError(f"{name}: {problem}")

    @classmethod
    def redescribed(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**described, "bytes": tensors[""].numel()}

    @classmethod
    def layout(cls, described: Mapping[str, Any]) -> Layout:
        *leading, out, width = described["shape"]
        count, size = math.prod(leading) * -(-out // described["tile"]), described["bytes"]
        return {
            "": ((size,), torch.uint8),
            "_steps": (
                (math.prod(leading) * out // described.get("step_rows", 1), -(-width // described["group"])),
                STEPS,
            ),
            "_tiles": ((count + 1,), torch.int32 if size < 2**31 else torch.int64),
        }

    @classmethod
    def restore(
        cls, name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> Self:
        cls.check(name, described)
        for suffix, wanted in cls.layout(described).items():
            found = tensors.get(suffix)
            if found is None:
                raise CheckpointError(f"{name}: {name}{suffix} is missing; the packed file is damaged")
            if (tuple(found.shape), found.dtype) != wanted:
                raise CheckpointError(
                    f"{name}: {suffix or 'stream'} is {list(found.shape)} {found.dtype}, wanted {list(wanted[0])} "
                    f"{wanted[1]}; the packed file is damaged, quantize the model again"
                )
        stored: torch.dtype = getattr(torch, described["dtype"])
        code = Code(tuple(described["digits"]), frozenset(described["fours"]))
        shape: tuple[int, ...] = tuple(described["shape"])
        stream, steps, tiles = (tensors[suffix] for suffix in cls.SUFFIXES)
        tile, group, nnz = (int(described[key]) for key in ("tile", "group", "nnz"))
        together = int(described.get("step_rows", 1))
        steps = steps if together == 1 else steps.repeat_interleave(together, dim=0)
        packed = cls(stream, steps, tiles, shape, code, tile, group, nnz, stored, dtype or stored, step_rows=together)
        problem = None if packed.stream.is_meta else packed.problem()
        if problem:
            raise CheckpointError(f"{name}: {problem}; the packed file is damaged, quantize the model again")
        return packed

    def problem(self) -> str | None:
        """What is wrong with the tensors, in a few words, or None: after this the stream can be read to its end."""
        ends = self.tiles.to("cpu", torch.int64)
        if int(ends[0]) != 0 or int(ends[-1]) != self.stream.numel() or bool((ends.diff() < 0).any()):
            return "tiles do not cut the stream into parts"
        most = torch.finfo(self.stored).max / 2**7 if self.stored.is_floating_point else 0.0
        if not bool(((self.steps.float() <= most) & ~self.steps.signbit()).all()):
            return f"a step is negative, NaN or too large for {str(self.stored).removeprefix('torch.')}"
        nnz = 0
        for rows, data in self._tiles():
            items = (rows.stop - rows.start) * self.shape[-1]
            try:
                extra = len(data) - sum(sizes(data, items, self.code))
            except DamagedStream as error:
                return f"the stream of rows {rows.start} to {rows.stop} {error}"
            if extra:
                return f"the stream of rows {rows.start} to {rows.stop} has {extra} bytes too many"
            nnz += nonzeros(data, items, self.code)
        return None if nnz == self.nnz else f"the stream has {nnz} numbers other than 0, the config says {self.nnz}"

    def moved(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        stream, steps, tiles = (tensor.to(device) for tensor in self._held())
        return replace(self, stream=stream, steps=steps, tiles=tiles, dtype=dtype or self.dtype)

    def rows(self, start: int, stop: int) -> Self:
        """Copies nothing where the cut is between tiles of a matrix, or is a matrix of several."""
        out, width = self.shape[-2:]
        first, last = start % max(1, out), (stop - 1) % max(1, out) + 1
        one = stop > start and (stop - 1) // out == start // out and first % self.tile_rows == 0
        if not one or (last % self.tile_rows and last != out):
            q = self.numbers().view(-1, width)[start:stop]
            part = self.written(q, self.steps[start:stop].cpu(), self.code, self.tile_rows, self.group, self.stored)
            return part.moved(self.device, self.dtype)
        at = start // out * -(-out // self.tile_rows) + first // self.tile_rows
        tiles = self.tiles[at : at + -(-(stop - start) // self.tile_rows) + 1]
        begin, end = int(tiles[0]), int(tiles[-1])
        part = replace(self, stream=self.stream[begin:end], steps=self.steps[start:stop], tiles=tiles - begin)
        part = replace(part, shape=(stop - start, width), step_rows=1)
        counts = (nonzeros(data, (at.stop - at.start) * width, self.code) for at, data in part._tiles())
        return replace(part, nnz=sum(counts))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        first, ends = parts[0], [torch.zeros(1, dtype=torch.int64, device=parts[0].device)]
        for part in parts:
            ends.append(part.tiles[1:].long() + ends[-1][-1])
        tiles = torch.cat(ends)
        return replace(
            first,
            stream=torch.cat([part.stream for part in parts]),
            steps=torch.cat([part.steps for part in parts]),
            tiles=tiles.to(torch.int32) if int(tiles[-1]) < 2**31 else tiles,
            shape=(len(parts), *first.shape),
            step_rows=1,
            nnz=sum(part.nnz for part in parts),
        )

    def emptied(self) -> Self:
        return replace(self, **{key: tensor.clone() for key, tensor in zip(TENSORS, self._held(), strict=True)})

    def emptied_of_tensors(self) -> Self:
        """What `written` needs to know beside numbers and steps."""
        return replace(self, **{key: tensor.new_empty(0) for key, tensor in zip(TENSORS, self._held(), strict=True)})

    def filled(self, weight: Tensor) -> Self:
        """The weight tells its numbers only together with the steps, which are most of what there is to keep."""
        return self.moved(weight.device, weight.dtype)

    def _held(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `TENSORS`: steps of every row."""
        return self.stream, self.steps, self.tiles

    def _tiles(self) -> Iterator[tuple[slice, Any]]:
        """The rows of each tile and its bytes."""
        data, ends = self.stream.cpu().numpy(), self.tiles.tolist()
        for number, rows in enumerate(_tile_slices(self.shape, self.tile_rows)):
            yield rows, data[ends[number] : ends[number + 1]]


def rows_sharing(steps: Tensor) -> int:
    """How many rows, one after the other, share their steps (rows, groups), throughout: 1 where not all do."""
    starts = (steps[1:] != steps[:-1]).any(1).nonzero().flatten() + 1
    return math.gcd(len(steps), *starts.tolist()) or 1


def entropy_of(q: Tensor) -> float:
    """-Σ p log2 p of int8 numbers q."""
    share = histogram(q.cpu().reshape(-1).numpy().view(np.uint8)) / max(1, q.numel())
    return -float((share * np.log2(np.maximum(share, 1e-300))).sum())


def _tile_slices(shape: tuple[int, ...], tile: int) -> Iterator[slice]:
    """Rows tile by tile, none of which reaches into two matrices."""
    *leading, out, _ = shape
    for matrix in range(math.prod(leading)):
        for start in range(0, out, tile):
            yield slice(matrix * out + start, matrix * out + min(start + tile, out))


def _whole(numbers: list[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)
