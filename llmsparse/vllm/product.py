"""x · Wᵀ of a layer of vLLM, whose matrix lies in parts one below the other, some packed and some dense."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUntypedFunctionDecorator=false
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional

from llmsparse.inference.linear import PackedMatrix

Part = PackedMatrix | Tensor  # (out, in)


class Parts:
    """The parts of a layer's matrix."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.sizes = [part.out_features if isinstance(part, PackedMatrix) else len(part) for part in parts]
        packed = [part for part in parts if isinstance(part, PackedMatrix)]
        alike = len(packed) == len(parts) and len({part.choice.backend for part in packed}) == 1
        together = alike and len(parts) > 1 and all(part.runs_many and part.copy is None for part in packed)
        limits = [part.choice.tokens for part in packed if part.choice.tokens is not None]
        self.together = packed if together else []  # what one call of the backend multiplies
        self.limit = min(limits, default=0)  # rows of x, up to which it does

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) → (..., out of all)."""
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        if self.together and 0 < x.numel() <= self.limit * x.shape[-1]:
            prepared = [part.prepared for part in self.together]
            return torch.cat(self.together[0].backend.run_many(prepared, x, biases), dim=-1)  # type: ignore[attr-defined]
        ys = [
            part.run(x, own) if isinstance(part, PackedMatrix) else functional.linear(x, part, own)
            for part, own in zip(self.parts, biases, strict=True)
        ]
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)


class Product:
    """What multiplies for a layer, found by its key from within a compiled graph.

    The graph names the layer and nothing of how it runs: vLLM keeps graphs on disk, for runs that choose another backend.
    """

    def __init__(self, prefix: str, run: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        names = itertools.chain([prefix], (f"{prefix}#{number}" for number in itertools.count(2)))  # a draft model's
        self.run = run
        self.key = next(name for name in names if name not in _HELD)
        _HELD[self.key] = self


_HELD: WeakValueDictionary[str, Product] = WeakValueDictionary()


@torch.library.custom_op("llmsparse::vllm_linear", mutates_args=())
def vllm_linear(x: Tensor, bias: Tensor | None, key: str, out: int) -> Tensor:
    """x (..., in) → (..., out)."""
    return _HELD[key].run(x, bias)


@vllm_linear.register_fake
def _(x: Tensor, bias: Tensor | None, key: str, out: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))
