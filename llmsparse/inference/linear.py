"""The modules that a packed checkpoint loads into.

They pass through two states. While a checkpoint loads they hold the neutral tensors under the names that are on disk,
on meta at first, in their exact shapes. `prepare` then hands each weight to a backend, and the neutral tensors are
dropped; saving rebuilds them, equal. Packed weights are not trained, and an edit that would be lost is refused; gradients
pass through them to what stands before, so that adapters and biases can be.
"""

# pyright: reportUnknownMemberType=false, reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmsparse.backends import BACKENDS, WeightSpec
from llmsparse.backends.choice import AUTO, Choice, choose_backend
from llmsparse.backends.protocol import KnowsMore, RunsMany
from llmsparse.errors import RecipeError
from llmsparse.formats import PackedTensor, format_of, layout, restore
from llmsparse.inference import graphed
from llmsparse.inference.cut_product import by_kernel, moved
from llmsparse.inference.gradient import PackedProduct, wants_gradient
from llmsparse.inference.read_only import LOST, read_only
from llmsparse.inference.shared_input import shared_product
from llmsparse.models.thresholds import Applied


class Packed(Protocol):
    """A packed weight in the hands of a backend, one matrix or many."""

    choice: Choice
    transposed: bool
    device: torch.device
    dtype: torch.dtype
    described: dict[str, Any]  # for config.json

    def __init__(self, packed: PackedTensor, choice: Choice, transposed: bool = False) -> None: ...

    def packed(self) -> PackedTensor: ...


Held = TypeVar("Held", bound=Packed)
DTYPES = "dtypes_of_packed"  # attribute of a module that waits for packed weights: leaf → dtype to unpack to


class PackedMatrix:
    """A packed weight in the hands of a backend: (out, in), or all experts of a stack (experts, out, in)."""

    def __init__(self, packed: PackedTensor, choice: Choice, transposed: bool = False) -> None:
        spec = WeightSpec.of(packed, transposed, choice.whole)
        self.backend = BACKENDS[choice.backend]
        self.transposed = transposed
        self.device, self.dtype = spec.device, spec.dtype
        self.described = packed.describe() | ({"transposed": True} if transposed else {})  # for config.json
        self.out_features = packed.shape[-2]
        self.prepared: Any = self.backend.prepare(packed, spec)
        self.beyond: KnowsMore | None = self.backend if isinstance(self.backend, KnowsMore) else None
        if self.beyond is not None and choice.tokens is not None:
            choice = replace(choice, tokens=min(choice.tokens, self.beyond.tokens_of(self.prepared)))
        self.choice = choice
        self.copy = self.backend.dense(self.prepared) if choice.dense_copy else None
        self.runs_many = isinstance(self.backend, RunsMany)
        self.handle = graphed.name(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = graphed.name(self)  # a copy is another weight

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) → x · Wᵀ + bias (..., out), with gradients for x and bias."""
        if not wants_gradient(x, bias):
            return self.run(x, bias)
        if self.choice.backend == "dense" or self.copy is not None or torch.compiler.is_compiling():
            return functional.linear(x, self.dense(), bias)  # it is there anyway
        return cast(Tensor, PackedProduct.apply(x, bias, self))

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same without gradients, by the backend where it takes so many tokens."""
        limit = self.choice.tokens
        few = limit is None or x.numel() <= limit * x.shape[-1]
        if not torch.is_autocast_enabled(x.device.type):  # no kernel knows of autocast
            if few:
                return self.backend.run(self.prepared, x, bias)
            if self.beyond is not None and self.copy is None:
                return self.beyond.run_beyond(self.prepared, x, bias)
        weight = self.backend.borrow(self.prepared) if self.copy is None else self.copy
        return functional.linear(x, weight, bias)

    def dense(self) -> Tensor:
        """The weight, unpacked."""
        return self.backend.dense(self.prepared) if self.copy is None else self.copy

    def packed(self) -> PackedTensor:
        """The neutral tensors, as they were loaded."""
        return self.backend.restore(self.prepared)


class PackedLayer(nn.Module):
    """A linear layer, or transformers' Conv1D, whose weight is packed.

    `weight` stays readable: models that use the matrix itself get it unpacked. To whoever looks for layers to put an
    adapter on it is of the kind that it replaces, but it has no parameter `weight`.
    """

    bias: nn.Parameter | None

    def __init__(self, described: Mapping[str, Any], bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = (int(size) for size in described["shape"])
        self.matrix: PackedMatrix | None = None
        self.bias = bias
        self.group: Any = 0  # of layers that share its input
        self.rule: Applied | None = None  # by which it leaves inputs out
        place(self, "weight", described, dtype)

    def prepare(self, name: str, described: Mapping[str, Any], backend: str = AUTO, optimize: str = "memory") -> None:
        """Hand the loaded weight to a backend. CheckpointError where it is damaged, MachineError for a named backend
        that cannot run it."""
        packed = take(self, "weight", name, described)
        transposed = bool(described.get("transposed"))
        choice = chosen(name, packed, transposed=transposed, backend=backend, optimize=optimize)
        self.matrix = PackedMatrix(packed, choice, transposed)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        assert self.matrix is not None
        bias = self.bias
        if self.rule is not None:
            bias = self.rule.bias(bias)
            if (y := by_kernel(self.matrix, self.rule, x, bias)) is not None:
                return y
            x = self.rule.cut(x)
        if torch.compiler.is_compiling():
            return product_in_graph(self.matrix, x, bias)
        shared = shared_product(self, x)
        return self.matrix(x, bias) if shared is None else shared

    def __getattr__(self, name: str) -> Any:
        matrix = self.__dict__.get("matrix")
        if name == "weight" and matrix is not None:
            return read_only(matrix.dense().transpose(-1, -2) if matrix.transposed else matrix.dense())
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.__dict__.get("matrix") is not None:
            raise RecipeError(f"{self.matrix.choice.weight if self.matrix else name} is {LOST}")
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> PackedLayer:
        if requires_grad and self.matrix is not None:
            raise RecipeError(
                f"{self.matrix.choice.weight} is packed, and packed weights are not trained; put an adapter on the layer, "
                "or make the model dense first (model.dequantize())"
            )
        super().requires_grad_(requires_grad)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        super()._apply(fn, recurse)
        if self.matrix is not None:
            self.matrix = carried(self.matrix, fn)
        if self.rule is not None:
            self.rule = moved(self.rule, fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.matrix is not None:
            destination.update({f"{prefix}weight{end}": held for end, held in self.matrix.packed().tensors().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.matrix is not None:
            self.matrix = reloaded(self.matrix, f"{prefix}weight", state_dict, rest[2] if rest[1] else [])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return shape if self.matrix is None else f"{shape}, backend={self.matrix.choice.backend}"


class SparseLinear(PackedLayer, nn.Linear):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An `nn.Linear` whose weight is packed."""


def product_in_graph(matrix: PackedMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias in a graph that is being compiled: by an op of ours where torch cannot trace through the backend."""
    if matrix.backend.compiles:
        return matrix(x, bias)
    if torch.is_autocast_enabled(x.device.type):  # torch's products cast their operands, ops of others do not
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), bias if bias is None else bias.to(dtype)
    return cast(Tensor, graphed.packed_linear(x, bias, matrix.handle, matrix.out_features))


def place(module: nn.Module, leaf: str, described: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Give a module empty neutral tensors, on meta, in place of its parameter `leaf`, which is to be of `dtype`."""
    module._parameters.pop(leaf, None)
    for suffix, (shape, stored) in layout({**described, "dtype": _name(dtype)}).items():
        if suffix:
            module.register_buffer(leaf + suffix, torch.empty(shape, dtype=stored, device="meta"))
        else:
            values = torch.empty(shape, dtype=stored, device="meta")
            module.register_parameter(leaf, nn.Parameter(values, requires_grad=False))
    vars(module).setdefault(DTYPES, {})[leaf] = dtype


def fill(module: nn.Module, leaf: str, packed: PackedTensor) -> None:
    """Put the tensors of `packed` into the places made by `place`."""
    for suffix, tensor in packed.tensors().items():
        if suffix:
            module._buffers[leaf + suffix] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def take(module: nn.Module, leaf: str, name: str, described: Mapping[str, Any]) -> PackedTensor:
    """The neutral tensors of a module, checked, and no longer the module's. CheckpointError where they are damaged."""
    tensors: dict[str, Tensor] = {}
    for suffix in layout(described):
        held = module._buffers.pop(leaf + suffix, None) if suffix else module._parameters.pop(leaf)
        if held is not None:
            tensors[suffix] = held.detach()
    dtype = vars(module)[DTYPES].pop(leaf)
    values = tensors[""].dtype  # transformers loads some in float32, whatever the model is in
    return restore(name, described, tensors, values if values.is_floating_point else dtype)


def chosen(
    name: str, packed: PackedTensor, *, transposed: bool = False, whole: bool = False, backend: str, optimize: str
) -> Choice:
    """The choice for a packed weight."""
    size = sum(tensor.nbytes for tensor in packed.tensors().values())
    return choose_backend(name, WeightSpec.of(packed, transposed, whole), size, backend=backend, optimize=optimize)


def carried(held: Held, fn: Callable[[Tensor], Tensor]) -> Held:
    """A packed weight after `model.to(...)`: chosen and prepared anew where device or dtype change."""
    target = fn(torch.empty(0, dtype=held.dtype, device=held.device))
    if (target.device, target.dtype) == (held.device, held.dtype):
        return held
    return _anew(held, held.packed().moved(target.device, target.dtype))


def reloaded(held: Held, name: str, state_dict: dict[str, Any], missing: list[str]) -> Held:
    """A packed weight after `load_state_dict`, whose tensors for it are taken out of `state_dict`, or their absence noted
    in `missing`. RecipeError for a dense one, CheckpointError for one that is damaged or of another shape."""
    wanted = layout(held.described)
    given = {end: state_dict.pop(name + end) for end in wanted if name + end in state_dict}
    if not given:
        missing.append(name)
        return held
    if len(wanted) > 1 and given.keys() == {""}:
        raise RecipeError(
            f"{name}: a dense weight for a layer that is packed; load it into a dense model (model.dequantize(), or "
            "from_pretrained of the dense folder)"
        )
    packed = restore(name, format_of(held.described).redescribed(held.described, given), given, held.dtype)
    return _anew(held, packed.moved(held.device))


def _anew(held: Held, packed: PackedTensor) -> Held:
    """The same choice made again, for other values or another place."""
    before = held.choice
    choice = chosen(
        before.weight,
        packed,
        transposed=held.transposed,
        whole=before.whole,
        backend=before.asked,
        optimize=before.optimize,
    )
    return type(held)(packed, choice, held.transposed)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
