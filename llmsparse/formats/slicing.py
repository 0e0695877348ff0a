"""Parts of a packed weight, and parts as a whole again, without unpacking."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsparse.formats.bitmask import Bitmask


def repacked(weight: Tensor, mask: Tensor, pattern: str) -> Bitmask:
    """A weight (..., out, in) packed again with the mask that it had before, on the device that it is on."""
    empty = weight.new_empty(0)
    keep = Bitmask(empty, mask, None, tuple(weight.shape), pattern).keep()
    packed = Bitmask.pack(weight.detach().cpu(), pattern, keep.cpu())
    return moved(packed, weight.device)


def moved(packed: Bitmask, device: torch.device, dtype: torch.dtype | None = None) -> Bitmask:
    """The same on another device, with values of another dtype if one is given."""
    offsets = None if packed.offsets is None else packed.offsets.to(device)
    values = packed.values.to(device, dtype or packed.values.dtype)
    return Bitmask(values, packed.mask.to(device), offsets, packed.shape, packed.pattern)


def rows_of(packed: Bitmask, start: int, stop: int) -> Bitmask:
    """Rows `start` to `stop` of a weight, all leading dimensions counted as rows: (stop - start, in). Copies no value."""
    width = packed.shape[-1]
    mask = packed.mask.view(-1, packed.mask.shape[-1])[start:stop]
    shape = (stop - start, width)
    if packed.offsets is None:
        return Bitmask(packed.values[start:stop], mask, None, shape, packed.pattern)
    offsets = packed.offsets[start : stop + 1]
    values = packed.values[int(offsets[0]) : int(offsets[-1])]
    return Bitmask(values, mask, offsets - offsets[0], shape, packed.pattern)


def joined(parts: list[Bitmask]) -> Bitmask:
    """The inverse of `rows_of`: matrices (out, in) of one shape and pattern as one weight (len(parts), out, in)."""
    first = parts[0]
    values, mask = torch.cat([part.values for part in parts]), torch.stack([part.mask for part in parts])
    shape = (len(parts), *first.shape)
    if first.offsets is None:
        return Bitmask(values, mask, None, shape, first.pattern)
    offsets, before = [torch.zeros(1, dtype=torch.int64, device=values.device)], 0
    for part in parts:
        assert part.offsets is not None
        offsets.append(part.offsets[1:].long() + before)
        before += part.values.numel()
    kind = torch.int32 if before < 2**31 else torch.int64
    return Bitmask(values, mask, torch.cat(offsets).to(kind), shape, first.pattern)
