"""An unpacked weight as a model may read it: writing into it would change a copy, so it is refused.

What a packed layer hands out as `.weight` is made for the moment. Reading it, deriving from it and copying it are free;
`w += …`, `w.data = …`, `w[0] = …`, `torch.nn.init` and their kind raise RecipeError that names the way out.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from llmsparse.errors import RecipeError

LOST = (
    "packed, so an edit of its weight would be lost; make the model dense first (model.dequantize(), or llmsparse unpack), "
    "edit it and pack it again"
)
AUGMENTED = {
    f"__i{operator}__"
    for operator in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
}  # fmt: skip
WRITES = {"__setitem__", "__set__", "__delete__", *AUGMENTED}


class ReadOnly(Tensor):
    """A tensor that shares the memory of another and refuses to be written to; so does every view of it."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(target, ReadOnly) for target in _written(func, args, kwargs)):
            raise RecipeError(f"this layer is {LOST}")
        with torch._C.DisableTorchFunctionSubclass():
            memory = {_address(one) for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, ReadOnly)}
            plain, named = pytree.tree_map_only(ReadOnly, _plain, (tuple(args), dict(kwargs)))
            result = func(*plain, **named)
            return pytree.tree_map_only(Tensor, lambda one: read_only(one) if _address(one) in memory else one, result)


def read_only(weight: Tensor) -> Tensor:
    """The same numbers in the same memory, to be read. A graph that is being compiled gets the tensor itself."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(ReadOnly)


def _plain(weight: Tensor) -> Tensor:
    return weight.as_subclass(Tensor)


def _address(tensor: Tensor) -> int | None:
    """Where a tensor's memory begins; None where it has none of its own."""
    return tensor.untyped_storage().data_ptr() or None if tensor.layout == torch.strided else None


def _written(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that a function would write to."""
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in WRITES or kwargs.get("inplace") is True
    targets = pytree.tree_leaves((args[:1], kwargs.get("input"), kwargs.get("tensor"))) if in_place else []
    return [*targets, *pytree.tree_leaves(kwargs.get("out"))]
