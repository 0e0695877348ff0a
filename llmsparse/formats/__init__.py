"""How weights with zeros are stored: each format packs a weight and gives it back bit for bit.

A format is one file and one line in FORMATS. What lies on disk is neutral: kernels repack it when a model is loaded.
docs/packed-format.md specifies each, and the folder around it, for whoever writes a reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError, did_you_mean
from llmsparse.formats.bitmask import Bitmask
from llmsparse.formats.nested import Nested
from llmsparse.formats.protocol import Layout, PackedTensor

__all__ = ["FIRST", "FORMATS", "PackedTensor", "check_description", "format_of", "layout", "restore", "stored_bytes"]

FORMATS: dict[str, type[PackedTensor]] = {"bitmask": Bitmask, "nested": Nested}

FIRST = "bitmask"  # what an entry is that names no format: the first version knew of one


def format_of(described: Mapping[str, Any]) -> type[PackedTensor]:
    """The format of a weight that `check_description` has passed."""
    return FORMATS[described.get("format", FIRST)]


def check_description(name: str, described: Mapping[str, Any]) -> None:
    """CheckpointError naming `name` for an entry of a config that `layout` cannot be asked about."""
    wanted: Any = described.get("format", FIRST)
    if not isinstance(wanted, str) or wanted not in FORMATS:
        hint = did_you_mean(str(wanted), list(FORMATS))
        raise CheckpointError(f"{name}: format {wanted!r} is not known{hint}")
    FORMATS[wanted].check(name, described)


def layout(described: Mapping[str, Any]) -> Layout:
    """Suffix → (shape, dtype) of the tensors that store a weight, from what `describe()` says of it."""
    return format_of(described).layout(described)


def stored_bytes(described: Mapping[str, Any]) -> int:
    """Bytes of all tensors that store a weight."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout(described).values())


def restore(
    name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> PackedTensor:
    """A weight of its description and its tensors, to unpack to `dtype` if one is given. CheckpointError naming `name`
    where they do not agree."""
    check_description(name, described)
    return format_of(described).restore(name, described, tensors, dtype)
