"""Packed experts: the fused weights of a mixture of experts, each expert's matrix in the hands of a backend.

The module stays the model's own, with its activation and biases; its class becomes a subclass of it that hands out the
large parameters unpacked, so that any implementation of experts computes what it should. `sparse_experts` is the
implementation that runs each expert's packed matrices on the tokens routed to it. Experts that it does not reach
(Llama 4's), and linear layers with a forward of their own (Falcon's), multiply with what they are handed.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmsparse.backends.choice import AUTO, Choice
from llmsparse.backends.cpu_columns import CpuColumns
from llmsparse.errors import RecipeError
from llmsparse.formats import PackedTensor
from llmsparse.inference.cut_product import by_kernel
from llmsparse.inference.linear import PackedLayer, PackedMatrix, carried, chosen, reloaded, take
from llmsparse.inference.on_disk import Leaves, OnDisk, keep_on_disk
from llmsparse.inference.read_only import LOST, read_only
from llmsparse.inference.stored_experts import StoredStack
from llmsparse.models.experts import Product, bias_of_expert, expert_by_expert, matrix_of_expert
from llmsparse.storage.checkpoint import CheckpointReader

CUT = "cut"  # attribute of a module whose experts leave inputs out: parameter → CutStack (cut_experts.py)
STORED = "stored"  # attribute of a module whose experts lie on disk: who reads them, and which layer of theirs it is


class PackedStack:
    """The matrices of all experts, (experts, out, in), packed: one by one, or together where the backend is `dense` or
    the module wants the whole."""

    def __init__(self, packed: PackedTensor, choice: Choice, transposed: bool = False) -> None:
        self.choice = choice
        self.transposed = transposed
        self.described = packed.describe() | ({"transposed": True} if transposed else {})
        self.together = choice.whole or choice.backend == "dense"
        experts, out = packed.shape[0], packed.shape[-2]
        parts = [packed] if self.together else [packed.rows(e * out, (e + 1) * out) for e in range(experts)]
        self.matrices = [PackedMatrix(part, choice, transposed) for part in parts]
        self.device, self.dtype = self.matrices[0].device, self.matrices[0].dtype

    def run(self, expert: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (tokens, in) → (tokens, out)."""
        if self.together:
            return functional.linear(x, self.matrices[0].dense()[expert], bias)
        return self.matrices[expert](x, bias)

    @property
    def by_columns(self) -> bool:
        """Whether the kernel for inputs that are left out runs them."""
        return isinstance(self.matrices[0].backend, CpuColumns)

    def let_lie(self, made: Callable[[PackedMatrix], PackedMatrix]) -> None:
        """Put what is made of each expert's matrix in its place."""
        self.matrices = [made(matrix) for matrix in self.matrices]
        self.choice = self.matrices[0].choice

    def carried(self, fn: Callable[[Tensor], Tensor]) -> PackedStack:
        """The same after `model.to(...)`."""
        return carried(self, fn)

    def reloaded(self, name: str, state_dict: dict[str, Any], missing: list[str]) -> PackedStack:
        """What `load_state_dict` makes of it."""
        return reloaded(self, name, state_dict, missing)

    def dense(self) -> Tensor:
        """The whole weight, unpacked, as the module would hold it."""
        weight = self.matrices[0].dense() if self.together else torch.stack([part.dense() for part in self.matrices])
        return weight.transpose(-1, -2) if self.transposed else weight

    def packed(self) -> PackedTensor:
        """The neutral tensors, as they were loaded."""
        parts = [matrix.packed() for matrix in self.matrices]
        return parts[0] if self.together else type(parts[0]).joined(parts)


class SparseExperts(nn.Module):
    """Mixed into the class of a model's experts by `prepare_experts`."""

    stacks: dict[str, PackedStack | StoredStack]

    def __getattr__(self, name: str) -> Any:
        stack = self.__dict__["stacks"].get(name)
        return super().__getattr__(name) if stack is None else read_only(stack.dense())

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("stacks", ()):
            raise RecipeError(f"{self.stacks[name].choice.weight} is {LOST}")
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseExperts:
        super()._apply(fn, recurse)
        self.stacks = {name: stack.carried(fn) for name, stack in self.stacks.items()}
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, stack in self.stacks.items():
            destination.update({f"{prefix}{name}{end}": held for end, held in stack.packed().tensors().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        missing = rest[2] if rest[1] else []
        self.stacks = {leaf: one.reloaded(prefix + leaf, state_dict, missing) for leaf, one in self.stacks.items()}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def prepare_experts(
    module: nn.Module,
    name: str,
    described: Mapping[str, Mapping[str, Any]],
    backend: str = AUTO,
    optimize: str = "memory",
) -> None:
    """Hand the loaded weights of an experts module called `name` to a backend; `described`: parameter → description.

    CheckpointError where one is damaged, MachineError for a named backend that cannot run it.
    """
    whole = not hasattr(module, "is_transposed")  # `sparse_experts` will not be asked to run it
    stacks: dict[str, PackedStack] = {}
    for leaf, what in described.items():
        packed = take(module, leaf, f"{name}.{leaf}", what)
        transposed = bool(what.get("transposed"))
        choice = chosen(
            f"{name}.{leaf}", packed, transposed=transposed, whole=whole, backend=backend, optimize=optimize
        )
        stacks[leaf] = PackedStack(packed, choice, transposed)
    module.__dict__["stacks"] = stacks
    module.__class__ = _sparse(type(module))


@torch.compiler.disable
def sparse_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The implementation of experts called `llmsparse`.

    hidden_states (tokens, width); top_k_index and top_k_weights (tokens, k): the experts of each token, and their
    shares → (tokens, width). An index that is no expert of this module adds nothing.
    """
    return expert_by_expert(
        self,
        hidden_states,
        top_k_index,
        top_k_weights,
        lambda wanted: _arriving(self, wanted, hidden_states, top_k_index),
    )


def _arriving(self: Any, wanted: list[int], x: Tensor, index: Tensor) -> Iterator[tuple[int, Product]]:
    """The experts that x (tokens, width) wants, and what multiplies with them: in their order, or as they come from disk."""
    stored = self.__dict__.get(STORED)
    if stored is not None:
        on_disk, layer = stored
        for expert, matrices in on_disk.arriving(layer, wanted, x, index.shape[1]):
            yield expert, partial(_product, self, matrices, expert)
        return
    stacks = self.__dict__.get("stacks", {})
    for expert in wanted:
        products = {name: partial(stack.run, expert) for name, stack in stacks.items()}
        yield expert, partial(_product, self, products, expert)


def _product(self: Any, products: Mapping[str, Callable[..., Tensor]], expert: int, name: str, x: Tensor) -> Tensor:
    cut = vars(self).get(CUT, {}).get(name)
    if cut is not None:
        return _cut_product(self, products, expert, name, cut, x)
    bias = bias_of_expert(self, name, expert)
    if name in products:
        return products[name](x, bias)
    return functional.linear(x, matrix_of_expert(self, name, expert), bias)  # these experts are not packed


def _cut_product(
    self: Any, products: Mapping[str, Callable[..., Tensor]], expert: int, name: str, cut: Any, x: Tensor
) -> Tensor:
    rule, stack = cut.rules[expert], vars(self).get("stacks", {}).get(name)
    bias = rule.bias(bias_of_expert(self, name, expert))
    if isinstance(stack, PackedStack) and not stack.together:
        found = by_kernel(stack.matrices[expert], rule, x, bias)
    else:
        found = None if stack is not None else cut.product(getattr(self, name), self.is_transposed, expert, x, bias)
    if found is not None:
        return found
    if name in products:
        return products[name](rule.cut(x), bias)
    return functional.linear(rule.cut(x), matrix_of_expert(self, name, expert), bias)


@cache
def _sparse(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Sparse{kind.__name__}", (SparseExperts, kind), {})


def leave_on_disk(
    model: Any, reader: CheckpointReader, modules: Mapping[str, Leaves], *, size: int, backend: str = AUTO
) -> OnDisk:
    """Let the experts modules of a loaded model read their packed weights when they use them, in `size` bytes of memory."""
    on_disk = keep_on_disk(model, reader, modules, size=size, backend=backend)
    for number, layer in enumerate(on_disk.layers):
        module = model.get_submodule(layer.name)
        module.__dict__.update({"stacks": layer.stacks, STORED: (on_disk, number)})
        module.__class__ = _sparse(type(module))
    return on_disk


def packed_weights(model: nn.Module) -> Iterator[tuple[str, PackedMatrix | PackedStack | StoredStack]]:
    """Every packed weight of a loaded model, under the name that it is saved with."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer) and module.matrix is not None:
            yield f"{name}.weight", module.matrix
        elif isinstance(module, SparseExperts):
            for leaf, stack in module.stacks.items():
                yield f"{name}.{leaf}", stack
