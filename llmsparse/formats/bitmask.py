"""Format "bitmask": the surviving values in row order, a bit for every place, and where each row begins.

    values    dtype (nnz,); for N:M (rows, in·N/M)   rows = all leading dimensions × out
    mask      uint8 (..., out, ⌈in/8⌉)               bit c % 8 of byte c // 8 of a row is column c: 1, the value is stored
    offsets   int32 or int64 (rows + 1,)             values of row r are [offsets[r], offsets[r + 1]); not for N:M

One layout for every pattern: at 2:4 a bit per weight is what indices would cost, at 4:8 it is less. A bit says that a
place is *kept*, which comes from the pruner's mask or from the bit pattern of the weight and never from comparing with
zero: a kept weight may be zero, and -0.0 must come back as -0.0. In an N:M weight every group stores exactly N values;
one with fewer survivors keeps its lowest free places too, with the zeros that are there.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from llmsparse.errors import CheckpointError, PatternError
from llmsparse.patterns import NofM, parse_pattern

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes an element → dtype of its bit pattern
SUFFIXES = ("", "_mask", "_offsets")  # values keep the weight's own name, so that other software fails on their shape


@dataclass(frozen=True)
class Bitmask:
    """A weight of `shape` (..., out, in), packed."""

    values: Tensor
    mask: Tensor
    offsets: Tensor | None
    shape: tuple[int, ...]
    pattern: str  # unstructured, or N:M

    @classmethod
    def pack(cls, weight: Tensor, pattern: str = "unstructured", keep: Tensor | None = None) -> Self:
        """Pack a weight (..., out, in) on the CPU. Raises PatternError where it does not obey `pattern`, or where
        `keep` would lose a value."""
        weight = weight.contiguous()
        stored = weight.view(BITS[weight.element_size()]) != 0  # every place whose bits are not all 0
        if keep is None:
            keep = stored
        elif (stored & ~keep).any():
            raise PatternError("the keep-mask leaves out a weight that is not zero")
        group = nofm(pattern)
        rows, width = math.prod(weight.shape[:-1]), weight.shape[-1]
        if group is not None:
            keep = _exactly(keep.reshape(rows, width), group)
        keep = keep.reshape(rows, width)
        bits = torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))
        values = weight.view(rows, width)[keep]
        offsets = None
        if group is None:
            counts = torch.from_numpy(np.count_nonzero(keep.numpy(), axis=1))
            ends = counts.cumsum(0)  # int64
            offsets = torch.cat((ends.new_zeros(1), ends))
            offsets = offsets.to(torch.int32) if values.numel() < 2**31 else offsets
        else:
            values = values.view(rows, width * group.n // group.m)
        return cls(values, bits.view(*weight.shape[:-1], -1), offsets, tuple(weight.shape), pattern)

    def keep(self) -> Tensor:
        """The keep-mask, bool of the weight's shape, on the device of `mask`."""
        places = torch.arange(8, dtype=torch.uint8, device=self.mask.device)
        bits = (self.mask.unsqueeze(-1) >> places) & 1  # (..., out, ⌈in/8⌉, 8)
        return bits.flatten(-2)[..., : self.shape[-1]].bool()

    def unpack(self) -> Tensor:
        """The weight, (..., out, in) in its dtype, on the device of `mask`."""
        bits = self.values.flatten().view(BITS[self.values.element_size()])
        weight = torch.zeros(self.shape, dtype=bits.dtype, device=bits.device)
        return weight.masked_scatter_(self.keep(), bits).view(self.values.dtype)

    def tensors(self) -> dict[str, Tensor]:
        held = (self.values, self.mask, self.offsets)
        return {suffix: tensor for suffix, tensor in zip(SUFFIXES, held, strict=True) if tensor is not None}

    def describe(self) -> dict[str, Any]:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return {"shape": list(self.shape), "dtype": dtype, "nnz": self.values.numel(), "pattern": self.pattern}

    @classmethod
    def restore(cls, name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """What `describe()` and `tensors()` gave. CheckpointError where shapes, dtype, counts or offsets disagree, so
        that nothing that comes after can read outside of `values`."""
        pattern, shape = str(described["pattern"]), tuple(described["shape"])
        packed = cls(tensors[""], tensors["_mask"], tensors.get("_offsets"), shape, pattern)
        problem = packed.problem(described)
        if problem:
            raise CheckpointError(f"{name}: {problem}; the packed file is damaged, pack the checkpoint again")
        return packed

    def problem(self, described: Mapping[str, Any]) -> str | None:
        """What is wrong with the tensors, in a few words, or None. Counts are checked where tensors are not on meta."""
        wanted = layout(described)
        for suffix, tensor in self.tensors().items():
            if suffix not in wanted:
                return f"unexpected tensor {suffix}"
            if (tuple(tensor.shape), tensor.dtype) != wanted[suffix]:
                return f"{suffix or 'values'} is {list(tensor.shape)} {tensor.dtype}, wanted {list(wanted[suffix][0])} {wanted[suffix][1]}"
        if len(self.tensors()) != len(wanted):
            return "offsets are missing"
        if self.mask.is_meta:
            return None
        rows, width = math.prod(self.shape[:-1]), self.shape[-1]
        keep = self.keep().view(rows, width)
        padding = np.unpackbits(self.mask.cpu().reshape(rows, -1).numpy(), axis=1, bitorder="little")[:, width:]
        if padding.any():
            return "mask has bits beyond the last column"
        group = nofm(self.pattern)
        if group is not None:
            counts = keep.view(rows, -1, group.m).sum(-1)
            return None if bool((counts == group.n).all()) else f"mask has a group that does not keep {self.pattern}"
        assert self.offsets is not None
        counts = keep.sum(-1).cumsum(0)  # (rows,)
        if int(self.offsets[0]) != 0 or not torch.equal(self.offsets[1:].to(counts.dtype), counts):
            return "mask and offsets disagree"
        return None


def layout(described: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Suffix → (shape, dtype) of the tensors that store a weight, from what `describe()` says of it."""
    shape, nnz = tuple(int(n) for n in described["shape"]), int(described["nnz"])
    rows, width = math.prod(shape[:-1]), shape[-1]
    group = nofm(str(described["pattern"]))
    values = (nnz,) if group is None else (rows, width * group.n // group.m)
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "": (values, getattr(torch, str(described["dtype"]))),
        "_mask": ((*shape[:-1], -(-width // 8)), torch.uint8),
    }
    if group is None:
        stored["_offsets"] = ((rows + 1,), torch.int32 if nnz < 2**31 else torch.int64)
    return stored


def nofm(pattern: str) -> NofM | None:
    """N and M of `N:M`, None for `unstructured`."""
    if pattern == "unstructured":
        return None
    parsed = parse_pattern(pattern, None, "row")
    assert isinstance(parsed, NofM)
    return parsed


def _exactly(keep: Tensor, group: NofM) -> Tensor:
    """(rows, in) with N places kept in every group of M: the lowest free ones are added where there are fewer."""
    rows, width = keep.shape
    if width % group.m:
        raise PatternError(f"in_features {width} is not a multiple of {group.m}, so {group} cannot cover it")
    groups = keep.reshape(-1, group.m)
    missing = group.n - groups.sum(dim=1, keepdim=True)  # (groups, 1)
    if bool((missing < 0).any()):
        row = int((missing < 0).nonzero()[0, 0]) * group.m // width
        raise PatternError(f"row {row} keeps more than {group.n} of {group.m}, so it is not {group}")
    free = ~groups
    return (groups | (free & (free.cumsum(dim=1) <= missing))).view(rows, width)
