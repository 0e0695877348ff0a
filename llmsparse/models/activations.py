"""Hidden states between blocks, and what else each block is called with.

A model hands its blocks masks, rotary tables and positions, mostly the same for every block and batch, and not the
same for every kind of block. They are recorded as they are, each distinct tensor kept once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.ranks.group import ALONE
from llmsparse.ranks.share import Share

LATEST = 8  # tensors of one shape that a new one is compared with


class Call(NamedTuple):
    """Arguments of one block's call for one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool  # the hidden states went by keyword

    def bind(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the call with these hidden states."""
        if self.keyword:
            return self.args, self.kwargs | {"hidden_states": hidden}
        return (hidden, *self.args), self.kwargs


class Activations:
    """The hidden states of every batch that this process holds, (batch, tokens, width) each, before one block.

    `share` says which of all batches these are; they are all of them if it is not given.
    """

    def __init__(self, hidden: list[Tensor], calls: list[list[Call]], share: Share | None = None) -> None:
        self.hidden = hidden
        self.calls = calls  # [block][batch]
        self.share = share or Share(ALONE, tuple((one.shape[0], one.shape[1]) for one in hidden))

    def like(self, hidden: list[Tensor]) -> Activations:
        """Other hidden states of the same batches."""
        return Activations(hidden, self.calls, self.share)

    @property
    def nbytes(self) -> int:
        """Bytes held: hidden states, and every distinct tensor of the calls once."""
        storages = [tensor.untyped_storage() for tensor in (*self.hidden, *self.arguments())]
        return sum({id(storage): storage.nbytes() for storage in storages}.values())

    def arguments(self) -> Iterator[Tensor]:
        """Every tensor of every call."""
        for block in self.calls:
            for call in block:
                yield from tensors_in((call.args, call.kwargs))


class Recorder:
    """Takes down calls; equal tensors become one."""

    def __init__(self, blocks: int) -> None:
        self.hidden: list[Tensor] = []
        self.calls: list[list[Call]] = [[] for _ in range(blocks)]
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # of this batch: id -> (tensor, the one kept)
        self._kept: dict[tuple[Any, ...], list[Tensor]] = {}

    def next_batch(self) -> None:
        self._seen.clear()

    def record(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Take down the call of block `index`; returns its hidden states, (batch, tokens, width)."""
        hidden, call = split_call(args, kwargs)
        if index == 0:
            self.hidden.append(hidden)
        self.calls[index].append(Call(self._intern(call.args), self._intern(call.kwargs), call.keyword))
        return hidden

    def _intern(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._one(value)
        if next(tensors_in(value), None) is None:
            return value  # state that blocks share by reference stays the object that it is
        if isinstance(value, dict):
            return {key: self._intern(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
        items: list[Any] = [self._intern(item) for item in value]
        kind = cast(Any, type(value))
        return kind(*items) if hasattr(kind, "_fields") else kind(items)

    def _one(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._seen:
            alike = self._kept.setdefault((tensor.shape, tensor.stride(), tensor.dtype), [])
            kept = next((other for other in alike[-LATEST:] if torch.equal(other, tensor)), None)
            if kept is None:
                alike.append(kept := tensor)
            self._seen[id(tensor)] = (tensor, kept)
        return self._seen[id(tensor)][1]


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states of a block's call, and the rest of it."""
    if args and isinstance(args[0], Tensor):
        return args[0], Call(args[1:], kwargs, keyword=False)
    if isinstance(hidden := kwargs.get("hidden_states"), Tensor):
        return hidden, Call(args, {key: value for key, value in kwargs.items() if key != "hidden_states"}, keyword=True)
    raise CheckpointError("the model's blocks are called without hidden states; only a stack of blocks can be pruned")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():  # pyright: ignore[reportUnknownVariableType]
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from tensors_in(item)
