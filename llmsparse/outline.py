"""What a model does with its parameters, learned by running it once without their values.

Parameters stay on meta while activations are real zeros: a call of torch that mixes the two is made on meta, and its
result is zeros of the right shape. That takes no memory and next to no time, and shows which parameters are multiplied
with activations and how they are laid out, square ones too, and what container the blocks return. Names, classes and
annotations, which lie, are not asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from llmsparse.activations import split_call
from llmsparse.block import unwrap
from llmsparse.errors import CheckpointError
from llmsparse.skeleton import quiet, replaced
from llmsparse.tap import Watched

TOKENS = 8


@dataclass
class Outline:
    """The parameters that are multiplied with activations, and the container that blocks return."""

    transposed: dict[str, bool] = field(default_factory=dict[str, bool])  # parameter → laid out (in, out)
    container: type[tuple[Any, ...]] | type[list[Any]] | None = None  # that a block returns, if not a bare tensor
    items: int = 1  # in it

    def wrap(self, hidden: Tensor) -> Any:
        """Hidden states as a block would return them."""
        return hidden if self.container is None else self.container([hidden, *[None] * (self.items - 1)])


@torch.no_grad()
def outline(model: nn.Module, blocks: nn.ModuleList, device: torch.device) -> Outline:
    """Run `model`, whose parameters are on meta, on a few zeros.

    Raises CheckpointError where something happens between blocks: streaming would lose it.
    """
    result = Outline()
    last: list[Tensor] = []

    def note(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = split_call(args, kwargs)
            if last and hidden is not last[0]:
                raise CheckpointError(
                    f"{type(model).__name__} changes the hidden states between its blocks; only a plain stack of "
                    "blocks can be pruned"
                )
            output = forward(*args, **kwargs)
            last[:] = [unwrap(output)]
            if output is not last[0]:
                result.container, result.items = type(output), len(output)
            return output

        return run

    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
    with quiet(), replaced(blocks, note), _Zeros(model, result, device):
        model(ids, use_cache=False)
    return result


class _Zeros(TorchFunctionMode):
    def __init__(self, model: nn.Module, result: Outline, device: torch.device) -> None:
        super().__init__()
        self._watched = Watched(model.named_parameters())
        self._result = result
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        for product in self._watched.products(func, args, kwargs):
            self._result.transposed[product.slot[0]] = product.transposed
        if _on_meta(kwargs.get("device")):
            kwargs["device"] = self._device  # models create things where a parameter of theirs is
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if all(tensor.is_meta for tensor in tensors) or (func is Tensor.__getitem__ and args[0].is_meta):
            return func(*args, **kwargs)  # of a parameter alone; one expert of it, even if its number is real
        if any(tensor.is_meta for tensor in tensors):
            args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return pytree.tree_map_only(Tensor, self._real, func(*args, **kwargs))

    def _real(self, tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self._device) if tensor.is_meta else tensor


def _on_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"
