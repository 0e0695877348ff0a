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
        self._handles = handles_of(layers)  # of the weights that are known to be alike
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
            if y is not None and not wants_gradient(layer.bias):
                return y
        if not 0 < x.numel() <= self._limit or wants_gradient(x, layer.bias) or autocasting(x):
            return None
        return self._multiply(layer, x)

    def _multiply(self, layer: Layer, x: Tensor) -> Tensor | None:
        layers = [one for held in self._layers if (one := held()) is not None]
        if self._made is not None:
            self._wasted += 1
        if self._wasted > PATIENCE or not self._whole(layers):
            self._give_up(layers)
            return None
        matrices, biases = [one.matrix for one in layers], [one.bias for one in layers]
        products = matrices[0].backend.run_many([matrix.prepared for matrix in matrices], x, biases)
        made = Made(x, {id(one): part for one, *part in zip(layers, matrices, biases, products, strict=True)})
        self._made = made
        return made.parts.pop(id(layer))[-1]

    def _whole(self, layers: Sequence[Any]) -> bool:
        """Whether all of them are there, and one call can still run them."""
        if len(layers) < len(self._layers):
            return False
        handles = handles_of(layers)
        if handles != self._handles and alike(layers):
            self._handles = handles
        return handles == self._handles

    def _give_up(self, layers: Sequence[Any]) -> None:
        self._made = None
        for layer in layers:
            layer.group = ALONE


class Made:
    """Products of an input that wait to be picked up."""

    def __init__(self, x: Tensor, parts: dict[int, list[Any]]) -> None:
        """`parts`: id of a layer → its matrix and bias at the time, and the product."""
        self.x, self.parts = x, parts
        self._inferring = torch.is_inference_mode_enabled()
        # how often x has been written to, which an inference tensor does not count: a copy of it
        self._bits = x.clone() if x.is_inference() else x._version

    def take(self, layer: Layer, x: Tensor) -> Tensor | None:
        """The product of a layer, once; None where there is none, or x or the layer are no longer what they were."""
        if id(layer) not in self.parts:
            return None
        matrix, bias, y = self.parts.pop(id(layer))
        same = torch.equal(x, self._bits) if isinstance(self._bits, Tensor) else x._version == self._bits
        current = matrix is layer.matrix and bias is layer.bias and self._inferring == torch.is_inference_mode_enabled()
        return y if same and current else None


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
    if not layer.matrix.runs_many:
        layer.group = ALONE
    elif _LAST.x is x and all(held() is not layer for held in _LAST.layers):
        _LAST.layers.append(weakref.ref(layer))
    else:
        layers = [seen for held in _LAST.layers if (seen := held()) is not None and isinstance(seen.group, int)]
        together = Group(layers) if len(layers) > 1 and alike(layers) else None
        for one in layers:
            one.group = together or (one.group + 1 if one.group < PATIENCE else ALONE)
        _LAST.x, _LAST.layers = x, [weakref.ref(layer)]


def handles_of(layers: Sequence[Any]) -> tuple[int, ...]:
    return tuple(layer.matrix.handle for layer in layers)


def autocasting(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def alike(layers: Sequence[Any]) -> bool:
    """Whether one call can run these."""
    kinds = {(one.matrix.choice.backend, one.matrix.dtype, one.matrix.device, one.in_features) for one in layers}
    return len(kinds) == 1 and all(one.matrix.runs_many and one.matrix.copy is None for one in layers)
