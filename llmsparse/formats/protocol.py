"""What a format is: a way to store a weight that holds zeros, and to give it back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # suffix of a tensor's name → its shape and dtype


class PackedTensor(Protocol):
    """A weight of `shape` (..., out, in), stored. Its tensors are named after the weight: the one without a suffix has
    another shape than the weight, so that software that does not know the format fails on it.

    What lies in a config or a file may be anybody's: `check` and `restore` believe none of it.
    """

    FORMAT: ClassVar[str]  # its name in FORMATS and in config.json
    SINCE: ClassVar[int]  # the version of the packed folder that brought it
    MARK: ClassVar[
        tuple[str, torch.dtype]
    ]  # suffix and dtype of a two-dimensional tensor that tells of a packed weight
    SUFFIXES: ClassVar[tuple[str, ...]]  # of all tensors that it may have; the first is ""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def pattern(self) -> str:
        """`unstructured`, or `N:M` where every M consecutive inputs hold at most N values."""
        ...

    @property
    def nnz(self) -> int:
        """How many places are stored as values."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight that `unpack` makes."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def tile_rows(self) -> int:
        """`rows` cuts without packing anew where it begins and ends at a multiple of it."""
        ...

    def unpack(self) -> Tensor:
        """The weight (..., out, in), on `device`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by suffix."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `config.json` says of it: enough, with `tensors()`, to unpack."""
        ...

    @classmethod
    def check(cls, name: str, described: Mapping[str, Any]) -> None:
        """CheckpointError naming `name` unless `layout` can be asked about what a stranger wrote into a config."""
        ...

    @classmethod
    def redescribed(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The description of a weight of the same shape that is stored in `tensors`, as far as their sizes tell."""
        ...

    @classmethod
    def layout(cls, described: Mapping[str, Any]) -> Layout:
        """Shapes and dtypes of `tensors()`, from what `describe()` says."""
        ...

    @classmethod
    def restore(
        cls, name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> Self:
        """The inverse of `describe()` and `tensors()`, to unpack to `dtype` if one is given; CheckpointError naming `name`
        where they do not agree, so that nothing that comes after can read where it must not."""
        ...

    def moved(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """The same on another device, to unpack to another dtype if one is given."""
        ...

    def rows(self, start: int, stop: int) -> Self:
        """Rows `start` to `stop`, all leading dimensions counted as rows: (stop - start, in)."""
        ...

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The inverse of `rows`: matrices (out, in) of one shape as one weight (len(parts), out, in)."""
        ...

    def emptied(self) -> Self:
        """What `filled` needs beside the unpacked weight, in memory of its own."""
        ...

    def filled(self, weight: Tensor) -> Self:
        """Of what `emptied` kept, the whole again: equal tensors, where `weight` is what it unpacked to."""
        ...
