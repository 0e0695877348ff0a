"""What a packed model counts as: parameters as if it were dense, bytes as they are held.

transformers looks at `parameters()` and `buffers()` alone, where packed weights are not. The two methods of a model that
count are therefore replaced on the loaded model, and given back by `dequantize`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from llmsparse.inference.packed_experts import PackedStack, packed_weights

COUNTS = ("num_parameters", "get_memory_footprint")


def count_packed(model: Any) -> None:
    """Let a model's `num_parameters` and `get_memory_footprint` count its packed weights."""
    vars(model).update(
        num_parameters=MethodType(num_parameters, model), get_memory_footprint=MethodType(get_memory_footprint, model)
    )


def count_dense(model: Any) -> None:
    """Let a model count as transformers does."""
    for name in COUNTS:
        vars(model).pop(name, None)


def num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Parameters of the dense model; packed weights are none that could be trained."""
    own = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    weights: list[Any] = [] if only_trainable else [one for _, one in packed_weights(model)]
    return own + sum(math.prod(one.described["shape"]) for one in weights)


def get_memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """Bytes of all parameters, of buffers too, and of packed weights in the form in which their backends hold them."""
    own = type(model).get_memory_footprint(model, return_buffers)
    return own + sum(held_bytes(weight) for _, weight in packed_weights(model))


def held_bytes(weight: Any) -> int:
    """What a packed weight takes in memory, dense copies included."""
    parts = weight.matrices if isinstance(weight, PackedStack) else [weight]
    sizes = {  # by memory: parts may share it
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for part in parts
        for tensor in tensors_in((part.prepared, part.copy))
    }
    return sum(sizes.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every plain tensor inside a backend's layout, whatever it is made of."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            inner, _ = value.__tensor_flatten__()
            yield from tensors_in([getattr(value, name) for name in inner])
        else:
            yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(list(vars(value).values()))
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_in(item)
