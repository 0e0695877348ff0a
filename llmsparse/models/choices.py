"""Which matrices of a block only choose: those of routers, which say where tokens go and leave the rest to others.

Learned from one run of the block, as a graph of what was computed from what. Two kinds are found, whatever they are
called and wherever they stand. *Scores*: a matrix whose output reaches top-k, argmax or a sort on its own, through no
other product, as the last layer of a router does; or one with a single output, a gate on all that a token gets. And
what *leads to a choice alone*: a matrix from which no way leads to the block's output but through scores or a choice,
as the earlier layers of a router do. What feeds a choice and something else besides is an ordinary matrix.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmsparse.models.tap import ADDMM, MATMUL

MIXES = {F.linear, torch.einsum, F.scaled_dot_product_attention} | MATMUL | ADDMM
CHOOSES = {
    torch.topk, Tensor.topk, torch.argmax, Tensor.argmax, torch.sort, Tensor.sort, torch.argsort, Tensor.argsort,
    torch.multinomial, Tensor.multinomial,
}  # fmt: skip
MAYBE = {torch.max, Tensor.max, torch.min, Tensor.min, Tensor.argmin, torch.argmin}  # only where the place is used


@dataclass(eq=False)
class _Node:
    """A call, or the memory that calls write and read; `then` is what came of it."""

    then: list[_Node] = field(default_factory=list["_Node"])
    product: bool = False  # with a parameter
    mixes: bool = False  # a product of any kind
    chooses: bool = False
    places: _Node | None = None  # where a choice that may be none, such as max, leaves the places it found


class Choices:
    """The graph of one block's run."""

    def __init__(self) -> None:
        self._memory: dict[int, tuple[_Node, Any]] = {}
        self._products: dict[str, list[_Node]] = {}
        self._single: set[str] = set()

    def note(self, func: Any, names: Iterable[str], inputs: Iterable[Tensor], results: list[Tensor]) -> None:
        """Take down a call: its tensors, parameters left out, its results, and the watched parameters among `names`."""
        names, inputs = list(names), list(inputs)
        call = _Node(mixes=func in MIXES, chooses=func in CHOOSES)
        real = [tensor for tensor in inputs if not tensor.is_meta]
        call.product = bool(names) or (call.mixes and len(real) < len(inputs))
        for tensor in real:
            self._of(tensor).then.append(call)
        if func is Tensor.__setitem__ and real:
            results = [real[0]]
        for result in results:
            call.then.append(self._of(result))
        if func in MAYBE and results and not results[-1].is_floating_point():
            call.places = self._of(results[-1])
        for name in names:
            self._products.setdefault(name, []).append(call)
            if results and results[0].dim() and results[0].shape[-1] == 1:
                self._single.add(name)

    def routers(self, output: Tensor) -> set[str]:
        """The watched parameters that only choose, given the hidden states that the block returned."""
        end = self._of(output)
        scores = {call for call in self._calls() if call.product and _reaches(call, _chosen, _mixed)}
        found = {name for name, nodes in self._products.items() if name in self._single or scores.issuperset(nodes)}
        scores.update(node for name in found for node in self._products[name])

        def decided(node: _Node) -> bool:
            return node in scores or _chosen(node)

        for name, nodes in self._products.items():
            if name in found:
                continue
            useful = any(_reaches(node, lambda one: one is end, decided) for node in nodes)
            leads = all(_reaches(node, decided, _never) for node in nodes)
            if leads and not useful:
                found.add(name)
        return found

    def _calls(self) -> set[_Node]:
        return {call for node, _ in self._memory.values() for call in node.then}

    def _of(self, tensor: Tensor) -> _Node:
        storage = tensor.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key not in self._memory:
            self._memory[key] = (_Node(), storage)  # held, so that its address stays its own
        return self._memory[key][0]


def _chosen(node: _Node) -> bool:
    return node.chooses or (node.places is not None and bool(node.places.then))


def _mixed(node: _Node) -> bool:
    return node.mixes


def _never(node: _Node) -> bool:
    return False


def _reaches(start: _Node, wanted: Callable[[_Node], bool], stop: Callable[[_Node], bool]) -> bool:
    """Whether a way leads from a call to a wanted node, through none that stops it."""
    seen: set[_Node] = {start}
    waiting = list(start.then)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if wanted(node):
            return True
        if not stop(node):
            waiting += node.then
    return False
