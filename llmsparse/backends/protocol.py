"""What a backend is: a way to multiply activations with a packed weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from llmsparse.formats import PackedTensor
from llmsparse.formats.nested import Nested


@dataclass(frozen=True)
class WeightSpec:
    """A packed weight, and where it is to run: all that a choice of backend may depend on."""

    shape: tuple[int, ...]  # (out, in), or (experts, out, in)
    pattern: str  # unstructured, or N:M
    nnz: int
    dtype: torch.dtype
    device: torch.device
    transposed: bool = False  # the module that it stands for keeps (in, out)
    whole: bool = False  # the module multiplies with it in a way of its own: it must be handed over unpacked
    format: str = "bitmask"  # of FORMATS
    group: int | None = None  # columns that share a step; of nested weights
    stored: torch.dtype | None = None  # that these are rounded to, whatever they are computed with in

    @classmethod
    def of(cls, packed: PackedTensor, transposed: bool = False, whole: bool = False) -> WeightSpec:
        where = (packed.dtype, packed.device)
        few = (packed.group, packed.stored) if isinstance(packed, Nested) else (None, None)
        return cls(packed.shape, packed.pattern, packed.nnz, *where, transposed, whole, packed.FORMAT, *few)

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / max(1, math.prod(self.shape))

    @property
    def dense_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Backend(Protocol):
    """A kernel and the layout that it wants. What `prepare` returns is its own affair; nobody else looks into it."""

    @property
    def name(self) -> str: ...

    @property
    def formats(self) -> tuple[str, ...] | None:
        """Of which of FORMATS it can make its layout; None: of any."""
        ...

    @property
    def compiles(self) -> bool:
        """`torch.compile` traces through `run`; otherwise a graph has it as an op of torch."""
        ...

    @property
    def exact(self) -> bool:
        """It gives the dense product but for the order of sums. What rounds its input runs where it is asked for by name."""
        ...

    def why_not(self, spec: WeightSpec) -> str | None:
        """Why this weight cannot run here, in a few words; None if it can."""
        ...

    def wrong(self, device: torch.device) -> str | None:
        """Why its kernel must not be used on a device on which it could run: it has been tried there, and erred."""
        ...

    def tokens(self, spec: WeightSpec) -> int | None:
        """Up to how many rows of activations at once `run` beats unpacking the weight for a product; None: any number."""
        ...

    def prepare(self, packed: Any, spec: WeightSpec) -> Any:
        """Repack for the kernel. The neutral tensors may be dropped afterwards."""
        ...

    def run(self, prepared: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) → x · Wᵀ + bias (..., out), in the dtype of x, which is the weight's."""
        ...

    def dense(self, prepared: Any) -> Tensor:
        """The weight itself (..., out, in), bit for bit."""
        ...

    def borrow(self, prepared: Any) -> Tensor:
        """The same for a moment: the next call from this thread may overwrite it."""
        ...

    def restore(self, prepared: Any) -> PackedTensor:
        """What `prepare` was given: equal tensors, which is what is saved."""
        ...


@runtime_checkable
class KnowsCopies(Protocol):
    """A backend that beats unpacking for more tokens than it beats a product with a dense copy that is there."""

    def tokens_beside_copy(self, spec: WeightSpec) -> int:
        """Up to how many rows of activations at once `run` beats that."""
        ...


@runtime_checkable
class KnowsMore(Protocol):
    """A backend that can say more of a weight once it is prepared."""

    def tokens_of(self, prepared: Any) -> int:
        """`tokens` of this weight, or fewer."""
        ...

    def run_beyond(self, prepared: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """`run` for more rows than that, where there is no dense copy: exact, and no slower than unpacking."""
        ...


@runtime_checkable
class RunsMany(Protocol):
    """A backend that multiplies the same activations with several weights in one call."""

    def run_many(self, prepared: Sequence[Any], x: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
        """`run` for each of the weights, in contiguous tensors of their own."""
        ...
