"""Format "bitmask": the surviving values in row order, a bit for every place, and where each row begins.

    values    dtype (nnz,); for N:M (rows, in·N/M)   rows = all leading dimensions × out
    mask      uint8 (..., out, ⌈in/8⌉)               bit c % 8 of byte c // 8 of a row is column c: 1, the value is stored
    offsets   int32 or int64 (rows + 1,)             values of row r are [offsets[r], offsets[r + 1]); not for N:M

One layout for every pattern: at 2:4 a bit per weight is what indices would cost, at 4:8 it is less. A bit says that a
place is *kept*, which comes from the pruner's mask or from the bit pattern of the weight and never from comparing with
zero: a kept weight may be zero, and -0.0 must come back as -0.0. In an N:M weight every group stores exactly N values;
one with fewer survivors keeps its lowest free places too, with the zeros that are there.

docs/packed-format.md specifies it, and the folder around it, for whoever writes a reader.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from llmsparse.errors import CheckpointError, PatternError
from llmsparse.formats.mask import bits_of, nofm, obeys, set_bits
from llmsparse.formats.protocol import Layout
from llmsparse.sparsity.patterns import PATTERNS, NofM

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes an element → dtype of its bit pattern
CHUNK = 2**22  # elements packed at once: temporaries stay small beside the weight


@dataclass(frozen=True)
class Bitmask:
    """A weight of `shape` (..., out, in), packed."""

    FORMAT: ClassVar[str] = "bitmask"
    SINCE: ClassVar[int] = 1
    MARK: ClassVar[tuple[str, torch.dtype]] = ("_mask", torch.uint8)
    SUFFIXES: ClassVar[tuple[str, ...]] = ("", "_mask", "_offsets")

    values: Tensor
    mask: Tensor
    offsets: Tensor | None
    shape: tuple[int, ...]
    pattern: str  # unstructured, or N:M

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def tile_rows(self) -> int:
        return 1

    @classmethod
    def pack(cls, weight: Tensor, pattern: str = "unstructured", keep: Tensor | None = None) -> Self:
        """Pack a weight (..., out, in) on the CPU. Raises PatternError where it does not obey `pattern`, or where
        `keep` would lose a value."""
        group = nofm(pattern)
        given = None if keep is None else keep.reshape(-1, weight.shape[-1])
        values: list[Any] = []
        masks: list[Any] = []
        counts: list[Any] = []
        for start, part in _chunks(weight):  # part (rows of the chunk, in), bit patterns
            kept = part != 0
            if given is not None:
                if bool((kept & ~given[start : start + len(part)]).any()):
                    raise PatternError("the keep-mask leaves out a weight that is not zero")
                kept = given[start : start + len(part)]
            if group is not None:
                kept = _exactly(kept, group, start)
            places: Any = kept.numpy()
            values.append(part.numpy()[places])
            masks.append(np.packbits(places, axis=1, bitorder="little"))
            counts.append(np.count_nonzero(places, axis=1))
        stored = torch.from_numpy(np.concatenate(values)).view(weight.dtype)
        mask = torch.from_numpy(np.concatenate(masks)).view(*weight.shape[:-1], -(-weight.shape[-1] // 8))
        if group is not None:
            width = weight.shape[-1] * group.n // group.m
            return cls(stored.view(math.prod(weight.shape[:-1]), width), mask, None, tuple(weight.shape), pattern)
        offsets = torch.from_numpy(np.concatenate([[0], *counts])).cumsum(0)  # int64
        offsets = offsets.to(torch.int32) if stored.numel() < 2**31 else offsets
        return cls(stored, mask, offsets, tuple(weight.shape), pattern)

    def keep(self) -> Tensor:
        """The keep-mask, bool of the weight's shape, on the device of `mask`."""
        return bits_of(self.mask, self.shape[-1])

    def unpack(self) -> Tensor:
        """The weight, (..., out, in) in its dtype, on the device of `mask`."""
        bits = self.values.flatten().view(BITS[self.values.element_size()])
        weight = torch.zeros(self.shape, dtype=bits.dtype, device=bits.device)
        return weight.masked_scatter_(self.keep(), bits).view(self.values.dtype)

    def tensors(self) -> dict[str, Tensor]:
        held = (self.values, self.mask, self.offsets)
        return {suffix: tensor for suffix, tensor in zip(self.SUFFIXES, held, strict=True) if tensor is not None}

    def describe(self) -> dict[str, Any]:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return {"shape": list(self.shape), "dtype": dtype, "nnz": self.values.numel(), "pattern": self.pattern}

    @classmethod
    def check(cls, name: str, described: Mapping[str, Any]) -> None:
        shape, nnz = described.get("shape"), described.get("nnz")
        whole: Any = isinstance(shape, list) and [*shape, nnz]
        if not whole or len(whole) < 3 or not all(type(number) is int and number >= 0 for number in whole):
            raise CheckpointError(f"{name}: shape {shape!r}, nnz {nnz!r}: wanted two or more sizes and a count")
        check_dtype(name, described)
        try:
            group = nofm(str(described.get("pattern")))
        except PatternError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if group is not None and (whole[-2] % group.m or nnz != math.prod(whole[:-1]) * group.n // group.m):
            raise CheckpointError(f"{name}: {group} of shape {shape} does not have nnz {nnz}")

    @classmethod
    def redescribed(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**described, "nnz": tensors[""].numel()}

    @classmethod
    def layout(cls, described: Mapping[str, Any]) -> Layout:
        shape, nnz = tuple(int(n) for n in described["shape"]), int(described["nnz"])
        rows, width = math.prod(shape[:-1]), shape[-1]
        group = nofm(str(described["pattern"]))
        values = (nnz,) if group is None else (rows, width * group.n // group.m)
        stored: Layout = {
            "": (values, getattr(torch, str(described["dtype"]))),
            "_mask": ((*shape[:-1], -(-width // 8)), torch.uint8),
        }
        if group is None:
            stored["_offsets"] = ((rows + 1,), torch.int32 if nnz < 2**31 else torch.int64)
        return stored

    @classmethod
    def restore(
        cls, name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> Self:
        cls.check(name, described)
        absent = [suffix for suffix in cls.SUFFIXES[:2] if suffix not in tensors]
        if absent:
            raise CheckpointError(f"{name}: {name}{absent[0]} is missing; the packed file is damaged")
        pattern, shape = str(described["pattern"]), tuple(described["shape"])
        packed = cls(tensors[""], tensors["_mask"], tensors.get("_offsets"), shape, pattern)
        if dtype is not None:  # a model may be loaded in another one than is stored
            described = {**described, "dtype": str(dtype).removeprefix("torch.")}
            packed = packed.moved(packed.device, dtype)
        problem = packed.problem(described)
        if problem:
            raise CheckpointError(f"{name}: {problem}; the packed file is damaged, pack the checkpoint again")
        return packed

    def moved(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        offsets = None if self.offsets is None else self.offsets.to(device)
        values = self.values.to(device, dtype or self.values.dtype)
        return type(self)(values, self.mask.to(device), offsets, self.shape, self.pattern)

    def rows(self, start: int, stop: int) -> Self:
        """Copies no value."""
        width = self.shape[-1]
        mask = self.mask.view(-1, self.mask.shape[-1])[start:stop]
        shape = (stop - start, width)
        if self.offsets is None:
            return type(self)(self.values[start:stop], mask, None, shape, self.pattern)
        offsets = self.offsets[start : stop + 1]
        values = self.values[int(offsets[0]) : int(offsets[-1])]
        return type(self)(values, mask, offsets - offsets[0], shape, self.pattern)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        first = parts[0]
        values, mask = torch.cat([part.values for part in parts]), torch.stack([part.mask for part in parts])
        shape = (len(parts), *first.shape)
        if first.offsets is None:
            return cls(values, mask, None, shape, first.pattern)
        offsets, before = [torch.zeros(1, dtype=torch.int64, device=values.device)], 0
        for part in parts:
            assert part.offsets is not None
            offsets.append(part.offsets[1:].long() + before)
            before += part.values.numel()
        kind = torch.int32 if before < 2**31 else torch.int64
        return cls(values, mask, torch.cat(offsets).to(kind), shape, first.pattern)

    def emptied(self) -> Self:
        return type(self)(self.values.new_empty(0), self.mask.clone(), None, self.shape, self.pattern)

    def filled(self, weight: Tensor) -> Self:
        """A kept place may hold a zero, so the mask says what is stored."""
        packed = self.pack(weight.detach().cpu(), self.pattern, self.keep().cpu())
        return packed.moved(weight.device)

    def problem(self, described: Mapping[str, Any]) -> str | None:
        """What is wrong with the tensors, in a few words, or None. Counts are checked where tensors are not on meta."""
        wanted = self.layout(described)
        for suffix, tensor in self.tensors().items():
            if suffix not in wanted:
                return f"unexpected tensor {suffix}"
            if (tuple(tensor.shape), tensor.dtype) != wanted[suffix]:
                shape, dtype = wanted[suffix]
                return f"{suffix or 'values'} is {list(tensor.shape)} {tensor.dtype}, wanted {list(shape)} {dtype}"
        if len(self.tensors()) != len(wanted):
            return "offsets are missing"
        return None if self.mask.is_meta else self._miscounted()

    def _miscounted(self) -> str | None:
        width, group = self.shape[-1], nofm(self.pattern)
        mask = self.mask.reshape(-1, -(-width // 8))  # (rows, bytes)
        if width % 8 and bool((mask[:, -1] >> (width % 8)).any()):
            return "mask has bits beyond the last column"
        if group is not None:
            whole = obeys(mask, width, group, exactly=True)
            return None if whole else f"mask has a group that does not keep {self.pattern}"
        assert self.offsets is not None
        ends = set_bits(mask).cumsum(0)  # (rows,)
        if int(self.offsets[0]) != 0 or not torch.equal(self.offsets[1:].to(torch.int64), ends):
            return "mask and offsets disagree"
        return None


def describe_unpacked(weight: Tensor) -> dict[str, Any]:
    """What `describe()` would say of a weight (..., out, in) on the CPU, packed in the narrowest pattern that it obeys:
    N:M where every group of consecutive inputs does, else unstructured. Packs nothing."""
    width, nnz = weight.shape[-1], 0
    obeyed = [NofM(n, m) for n, m in PATTERNS if width % m == 0]
    for _, part in _chunks(weight):
        kept: Any = (part != 0).numpy()
        nnz += int(np.count_nonzero(kept))
        mask = torch.from_numpy(np.packbits(kept, axis=1, bitorder="little"))
        obeyed = [group for group in obeyed if obeys(mask, width, group)]
    if obeyed:
        nnz = weight.numel() * obeyed[0].n // obeyed[0].m
    dtype = str(weight.dtype).removeprefix("torch.")
    pattern = str(obeyed[0]) if obeyed else "unstructured"
    return {"shape": list(weight.shape), "dtype": dtype, "nnz": nnz, "pattern": pattern}


def check_dtype(name: str, described: Mapping[str, Any]) -> None:
    """CheckpointError naming `name` where an entry has no dtype of weights, or does not say plainly how they are laid out."""
    dtype = getattr(torch, str(described.get("dtype")), None)
    if (
        str(dtype) != f"torch.{described.get('dtype')}"
        or not isinstance(dtype, torch.dtype)
        or dtype.itemsize not in BITS
    ):
        raise CheckpointError(f"{name}: dtype {described.get('dtype')!r} is not one that can be packed")
    transposed = described.get("transposed", False)
    if not isinstance(transposed, bool):
        raise CheckpointError(f"{name}: transposed {transposed!r}: wanted true or false")


def _chunks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, bit patterns (rows, in)) for the rows of a weight (..., out, in), some at a time."""
    bits = weight.contiguous().view(BITS[weight.element_size()])
    bits = bits.view(math.prod(weight.shape[:-1]), weight.shape[-1])
    step = max(1, CHUNK // max(1, weight.shape[-1]))
    for start in range(0, max(1, len(bits)), step):
        yield start, bits[start : start + step]


def _exactly(keep: Tensor, group: NofM, start: int) -> Tensor:
    """(rows, in) with N places kept in every group of M: the lowest free ones are added where there are fewer.
    `start` is the number of the first row."""
    rows, width = keep.shape
    if width % group.m:
        raise PatternError(f"in_features {width} is not a multiple of {group.m}, so {group} cannot cover it")
    groups = keep.reshape(-1, group.m)
    missing = group.n - torch.from_numpy(np.count_nonzero(groups.numpy(), axis=1))[:, None]  # (groups, 1)
    if not missing.numel() or not bool(missing.any()):
        return keep
    if bool((missing < 0).any()):
        row = start + int((missing < 0).nonzero()[0, 0]) * group.m // width
        raise PatternError(f"row {row} keeps more than {group.n} of {group.m}, so it is not {group}")
    free = ~groups
    return (groups | (free & (free.cumsum(dim=1) <= missing))).view(rows, width)
