"""One matrix of a stored stack (matrices, out, in), such as one expert's: where its bytes lie, and what they make."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.formats import PackedTensor, format_of, layout
from llmsparse.formats.bitmask import Bitmask
from llmsparse.formats.digits import Code
from llmsparse.formats.nested import Nested

INDEX = ("_offsets", "_tiles")  # tensors that say where in the one without a suffix rows, or tiles of rows, begin
Spans = dict[str, tuple[int, int]]  # suffix of a tensor → bytes [begin, end) of it


def index_of(described: Mapping[str, Any]) -> str | None:
    """The suffix of the tensor without which nobody knows where a matrix begins; None where all are of one size."""
    return next((suffix for suffix in layout(described) if suffix in INDEX), None)


def check_index(name: str, described: Mapping[str, Any], index: Tensor) -> None:
    """CheckpointError where an index points out of the tensor that it is of, or back."""
    (count,), _ = layout(described)[""]
    if int(index[0]) != 0 or int(index[-1]) != count or bool((index.diff() < 0).any()):
        raise CheckpointError(f"{name}: what says where rows begin is damaged; pack the checkpoint again")


def spans(described: Mapping[str, Any], index: Tensor | None, number: int) -> Spans:
    """Where matrix `number` lies in the tensors of its stack, but for the index."""
    matrices, found = math.prod(described["shape"][:-2]), Spans()
    for suffix, (shape, dtype) in layout(described).items():
        if suffix == "" and index is not None:
            ends = _ends(described, index, number)
            found[""] = int(ends[0]) * dtype.itemsize, int(ends[-1]) * dtype.itemsize
        elif suffix not in INDEX:
            each = math.prod(shape) * dtype.itemsize // matrices
            found[suffix] = number * each, (number + 1) * each
    return found


def matrix(
    described: Mapping[str, Any], index: Tensor | None, number: int, parts: Mapping[str, Tensor], dtype: torch.dtype
) -> PackedTensor:
    """The weight (out, in) that `parts`, bytes as `spans` has them, make, to unpack to `dtype`. They are not copied, and what
    they hold is not checked: that is left to whoever repacks them."""
    out, width = (int(size) for size in described["shape"][-2:])
    ends = None if index is None else _ends(described, index, number)
    ends = None if ends is None else ends - ends[0]
    stored: torch.dtype = getattr(torch, described["dtype"])
    if format_of(described) is Nested:
        assert ends is not None
        code = Code(tuple(described["digits"]), frozenset(described["fours"]))
        steps = parts["_steps"].view(torch.bfloat16).view(out, -1)
        frame = (code, int(described["tile"]), int(described["group"]))
        nnz = int(described["nnz"]) // math.prod(described["shape"][:-2])  # about
        return Nested(parts[""], steps, ends, (out, width), *frame, nnz, stored, dtype)
    values, mask = parts[""].view(stored), parts["_mask"].view(out, -1)
    if ends is None:
        values = values.view(out, -1)
    packed = Bitmask(values, mask, ends, (out, width), str(described["pattern"]))
    return packed if dtype == stored else packed.moved(packed.device, dtype)


def _ends(described: Mapping[str, Any], index: Tensor, number: int) -> Tensor:
    """The part of the index that is about one matrix."""
    each = (len(index) - 1) // math.prod(described["shape"][:-2])
    return index[number * each : (number + 1) * each + 1]
