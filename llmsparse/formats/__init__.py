"""How zeros are stored: each format packs a weight without its zeros and gives it back bit for bit.

A format is one file and one line in FORMATS. What lies on disk is neutral: kernels repack it when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from torch import Tensor

from llmsparse.formats.bitmask import Bitmask


class PackedTensor(Protocol):
    """A weight of shape (..., out, in) without its zeros."""

    @classmethod
    def pack(cls, weight: Tensor, pattern: str, keep: Tensor | None = None) -> Self:
        """Pack a weight; `pattern` is `unstructured` or `N:M`, `keep` a bool mask of its shape if it is known."""
        ...

    def unpack(self) -> Tensor:
        """The weight: `unpack(pack(w))` equals `w` bit for bit."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the suffix that its name gets behind the weight's own."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `config.json` says of it: enough, with `tensors()`, to unpack."""
        ...

    @classmethod
    def restore(cls, name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `describe()` and `tensors()`; CheckpointError naming `name` where they do not agree."""
        ...


FORMATS: dict[str, type[PackedTensor]] = {"bitmask": Bitmask}
