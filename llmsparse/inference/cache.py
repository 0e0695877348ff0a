"""Keys and values of one conversation, in transformers' cache; they grow without being copied at each token."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, DynamicLayer

GROWTH = 128  # tokens, at least, by which it grows; and a quarter of what there is


class GrowingLayer(DynamicLayer):
    """A DynamicLayer with room ahead, up to `most` tokens: a step writes its own keys and values, not all again."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._room: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values (1, heads, tokens, width), those of the step, (1, heads, step, width), the last."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [new.new_empty((*new.shape[:2], 0, new.shape[3])) for new in (key_states, value_states)]
        old, step = self.get_seq_length(), key_states.shape[2]
        if old + step > self._room[0].shape[2]:
            self._grow(old, old + step)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, old : old + step] = new
        self.keys, self.values = (room[:, :, : old + step] for room in self._room)
        return self.keys, self.values

    def _grow(self, old: int, needed: int) -> None:
        size = max(needed, min(self._most, needed + max(GROWTH, needed // 4)))
        for number, room in enumerate(self._room):
            self._room[number] = room.new_empty((*room.shape[:2], size, room.shape[3]))
            self._room[number][:, :, :old] = room[:, :, :old]


def new_cache(config: Any, most: int) -> DynamicCache:
    """An empty cache for a conversation of at most `most` tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def of_attention(cache: DynamicCache) -> bool:
    """Whether it holds nothing but keys and values of tokens: then a prompt can be read in parts."""
    return all(type(layer).__name__ in ("GrowingLayer", "DynamicSlidingWindowLayer") for layer in cache.layers)


def bytes_held(cache: DynamicCache) -> int:
    """Of keys and values; 0 for layers that hold something else."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
