"""Layers of the same input in one call: q, k and v of an attention, gate and up of an FFN.

Who shares an input is seen, not known: layers that are given the same tensor one after the other form a group. From then on the
first of them that is given a new input multiplies for all, and each of the others picks up its part, if what it is given is
that very tensor, unchanged. Whatever is called otherwise (alone, out of order, with gradients, with many tokens, with another
input) is multiplied by itself: the result never depends on the group.
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llmsparse.inference.gradient import wants_gradient

PATIENCE = 8  # products for nobody after which a group is given up, and calls alone after which none is looked for


class Layer(Protocol):
    """A packed layer."""

    in_features: int
    matrix: Any  # a PackedMatrix
    bias: Any
    group: Any  # a Group, ALONE, or how often it was seen alone


class _Alone:
    """What stands in the place of a group where there is none to be formed."""

    def __reduce__(self) -> str:
        return "ALONE"


ALONE = _Alone()


class Group:
    """Layers that share an input."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers: list[weakref.ref[Any]] = [weakref.ref(layer) for layer in layers]
        self._handles = [layer.matrix.handle for layer in layers]  # of the weights that are known to be alike
        self._limit = min(layer.matrix.choice.tokens * layer.in_features for layer in layers)
        self._made: Made | None = None
        self._wasted = 0

    def __reduce__(self) -> Any:  # a copy of a model finds its own groups
        return int, ()

    def product(self, layer: Layer, x: Tensor) -> Tensor | None:
        """x · Wᵀ + b of a layer; None where it must run by itself."""
        made = self._made
        if made is not None and made.x is x:
            y = made.take(layer, x)
            if not made.parts:
                self._made = None
            if y is not None:
                return y
        if not 0 < x.numel() <= self._limit or torch.is_autocast_enabled(x.device.type):
            return None
        return self._multiply(layer, x)

    def _multiply(self, layer: Layer, x: Tensor) -> Tensor | None:
        layers = [one for held in self._layers if (one := held()) is not None]
        if self._made is not None:
            self._wasted += 1
        matrices = [one.matrix for one in layers]
        handles = [matrix.handle for matrix in matrices]
        if self._wasted > PATIENCE or (handles != self._handles and not self._still(layers, handles)):
            self._give_up(layers)
            return None
        biases = [one.bias for one in layers]
        if wants_gradient(x, *biases):
            return None
        products = matrices[0].backend.run_many([matrix.prepared for matrix in matrices], x, biases)
        parts = dict(zip(map(id, layers), zip(matrices, biases, products, strict=True), strict=True))
        y = parts.pop(id(layer))[2]
        self._made = Made(x, parts)
        return y

    def _still(self, layers: Sequence[Any], handles: list[int]) -> bool:
        """Whether all of them are there, and one call can run what they have become."""
        if len(layers) < len(self._layers) or not alike(layers):
            return False
        self._handles = handles
        return True

    def _give_up(self, layers: Sequence[Any]) -> None:
        self._made = None
        for layer in layers:
            layer.group = ALONE


class Made:
    """Products of an input that wait to be picked up."""

    __slots__ = ("_bits", "_mode", "parts", "x")

    def __init__(self, x: Tensor, parts: dict[int, tuple[Any, Tensor | None, Tensor]]) -> None:
        """`parts`: id of a layer → its matrix and bias at the time, and the product."""
        self.x, self.parts, self._mode = x, parts, mode()
        # how often x has been written to, which an inference tensor does not count: a copy of it
        self._bits = x.clone() if x.is_inference() else x._version

    def take(self, layer: Layer, x: Tensor) -> Tensor | None:
        """The product of a layer, once; None where there is none, or x or the layer are no longer what they were."""
        part = self.parts.pop(id(layer), None)
        if part is None or part[0] is not layer.matrix or part[1] is not layer.bias or self._mode != mode():
            return None
        bits = self._bits
        same = torch.equal(x, bits) if isinstance(bits, Tensor) else x._version == bits
        return part[2] if same else None


def mode() -> tuple[bool, bool]:
    """What may be done with a tensor depends on it."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class _Last(threading.local):
    """The input that was seen last, and the layers that were given it."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.layers = list[weakref.ref[Any]]()


_LAST = _Last()


def shared_product(layer: Layer, x: Tensor) -> Tensor | None:
    """x · Wᵀ + b of a layer with those that share its input; None where it must run by itself."""
    group = layer.group
    if isinstance(group, Group):
        return group.product(layer, x)
    if group is not ALONE and not torch.is_grad_enabled():
        _notice(layer, x)
    return None


def _notice(layer: Layer, x: Tensor) -> None:
    """See what a layer is given, and form a group of those that were given the input before this one."""
    matrix = layer.matrix
    if not matrix.runs_many:
        layer.group = ALONE
    elif x.numel() > matrix.choice.tokens * layer.in_features:
        return  # a prompt: keeping its activations for a moment longer costs more than the moment
    elif _LAST.x is x and all(held() is not layer for held in _LAST.layers):
        _LAST.layers.append(weakref.ref(layer))
    else:
        layers = [seen for held in _LAST.layers if (seen := held()) is not None and isinstance(seen.group, int)]
        together = Group(layers) if len(layers) > 1 and alike(layers) else None
        for one in layers:
            one.group = together or (one.group + 1 if one.group < PATIENCE else ALONE)
        _LAST.x, _LAST.layers = x, [weakref.ref(layer)]


def alike(layers: Sequence[Any]) -> bool:
    """Whether one call can run these."""
    kinds = {(one.matrix.choice.backend, one.matrix.dtype, one.matrix.device, one.in_features) for one in layers}
    return len(kinds) == 1 and all(one.matrix.runs_many and one.matrix.copy is None for one in layers)
