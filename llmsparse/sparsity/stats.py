"""What calibration leaves behind about one input: norms, moments, the Gram matrix.

A statistic belongs to an *input*, so weights that read the same activations (q, k, v) share one. Each richer kind can
stand in for a poorer one: `InputNorm` ⊂ `InputMoments` ⊂ `Gram`. All of them are sums over tokens, so two that saw
different tokens can be merged. They keep no activations and know nothing of weights.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from llmsparse.errors import NumericalError

T = TypeVar("T")

LEAST_TOKENS = 32  # that say anything about how loud an input is: on 16 Wanda is worse than magnitude, on 64 as ever
TOKENS_PER_INPUT = 1.5  # of a Gram matrix: a solve from fewer than one an input is worse than Wanda, up to four times


class Statistic(Protocol):
    """Accumulates over calibration tokens; reducible over processes by `merge`."""

    tokens: int

    def __init__(self, width: int, device: torch.device) -> None: ...

    def update(self, x: Tensor) -> None:
        """Take in `x` (tokens, width), any float dtype; `x` is not changed."""
        ...

    def merge(self, other: Self) -> None:
        """Become what this would be after also seeing the tokens of `other`."""
        ...

    @staticmethod
    def nbytes(width: int) -> int:
        """Bytes held for an input of this width."""
        ...

    @staticmethod
    def least_tokens(width: int) -> int:
        """Tokens below which it says too little of an input of this width to prune by."""
        ...


class InputNorm:
    """Σ x² of every input, summed in fp32 within a batch and in fp64 over batches."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.tokens = 0
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        self.tokens += x.shape[0]
        self.squares += x.float().square().sum(dim=0)

    def merge(self, other: InputNorm) -> None:
        self.tokens += other.tokens
        self.squares += other.squares.to(self.squares.device)

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ over all tokens, (width,) fp32. Raises `NumericalError` where an activation was NaN or Inf."""
        broken = int((~self.squares.isfinite()).sum())
        if broken:
            raise NumericalError(
                f"calibration activations hold NaN or Inf in {broken} of {self.width} inputs after {self.tokens} tokens; "
                "try --dtype float32"
            )
        return self.squares.sqrt().float()

    @staticmethod
    def nbytes(width: int) -> int:
        return 8 * width

    @staticmethod
    def least_tokens(width: int) -> int:
        return LEAST_TOKENS


class InputMoments(InputNorm):
    """Adds mean and population variance of every input, pooled over all tokens (Chan, Golub, LeVeque 1979)."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self._mean = torch.zeros_like(self.squares)
        self._spread = torch.zeros_like(self.squares)  # Σ (x - mean)²

    def update(self, x: Tensor) -> None:
        if x.shape[0]:
            x = x.float()
            mean = x.mean(dim=0)
            spread = (x - mean).square_().sum(dim=0)
            self._pool(x.shape[0], mean.double(), spread.double())

    def merge(self, other: InputNorm) -> None:
        assert isinstance(other, InputMoments)
        if other.tokens:
            self._pool(other.tokens, other._mean.to(self._mean.device), other._spread.to(self._mean.device))

    def _pool(self, tokens: int, mean: Tensor, spread: Tensor) -> None:
        total = self.tokens + tokens
        shift = mean - self._mean
        self._mean += shift * (tokens / total)
        self._spread += spread + shift.square() * (self.tokens * (tokens / total))
        self.tokens = total
        self.squares = self._spread + total * self._mean.square()

    @property
    def mean(self) -> Tensor:
        """(width,) fp32."""
        return self._mean.float()

    @property
    def variance(self) -> Tensor:
        """Population variance, (width,) fp32."""
        return (self._spread / max(self.tokens, 1)).float()

    @staticmethod
    def nbytes(width: int) -> int:
        return 24 * width


class Gram(InputMoments):
    """Adds XᵀX, (width, width) fp32, and remembers factorizations of it for the weights that share this input."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self._strip = max(256, -(-width // 16))  # rows of XᵀX at a time, only right of the diagonal: half the work
        self._strips = [torch.zeros(min(self._strip, width - a), width - a, device=device) for a in self._starts]
        self._whole: Tensor | None = None  # XᵀX once it has been asked for; the strips are views of it from then on
        self._mirrored = False
        self._factors: dict[Hashable, Any] = {}

    def update(self, x: Tensor) -> None:
        x = x.float()
        super().update(x)
        for a, strip in zip(self._starts, self._strips, strict=True):
            strip.addmm_(x[:, a : a + self._strip].T, x[:, a:])
        self._changed()

    def merge(self, other: InputNorm) -> None:
        assert isinstance(other, Gram)
        super().merge(other)
        for mine, theirs in zip(self._strips, other._strips, strict=True):
            mine += theirs.to(mine.device)
        self._changed()

    @property
    def _starts(self) -> range:
        return range(0, self.width, self._strip)

    def _changed(self) -> None:
        self._mirrored = False
        self._factors.clear()

    @property
    def xtx(self) -> Tensor:
        """XᵀX (width, width) fp32, over all tokens, exactly symmetric; not to be changed."""
        if self._whole is None:
            self._whole = self.squares.new_empty(self.width, self.width, dtype=torch.float32)
            for number, a in enumerate(self._starts):
                view = self._whole[a : a + self._strip, a:]
                self._strips[number] = view.copy_(self._strips[number])
        if not self._mirrored:
            for a in self._starts:
                b = a + self._strip
                corner = self._whole[a:b, a:b]
                corner.copy_(corner.triu() + corner.triu(1).T)
                self._whole[b:, a:b] = self._whole[a:b, b:].T
            self._mirrored = True
        return self._whole

    def factor(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, once per `key` until the next update: q, k and v pay for one factorization."""
        if key not in self._factors:
            self._factors[key] = make()
        return self._factors[key]

    @staticmethod
    def nbytes(width: int) -> int:
        """While it is summed up: the strips, not the matrix."""
        strip = max(256, -(-width // 16))
        return InputMoments.nbytes(width) + 4 * sum(min(strip, width - a) * (width - a) for a in range(0, width, strip))

    @staticmethod
    def least_tokens(width: int) -> int:
        return max(LEAST_TOKENS, round(TOKENS_PER_INPUT * width))


def combine(a: type[Statistic] | None, b: type[Statistic] | None) -> type[Statistic] | None:
    """The poorest statistic that can stand in for both.

    >>> combine(InputNorm, Gram).__name__
    'Gram'
    """
    if a is None or b is None:
        return a or b
    assert a in b.__mro__ or b in a.__mro__
    return a if b in a.__mro__ else b
