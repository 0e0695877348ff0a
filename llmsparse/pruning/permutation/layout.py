"""How channels lie in the parameters that compute them, and in the matrix that takes them in: what moves with a channel.

Channels come in pieces, each with an order of its own: an FFN is one piece, attention has one for each key-value head, since
a channel of a value may change places within its head alone. A parameter may hold a channel several times: gate and up in
one, or the output projection, in which every query head takes in the channels of its value head.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter. `places` (copies, pieces, length): where a channel of a piece stands on it."""

    name: str
    dim: int  # counted from the end
    size: int
    places: Tensor

    def sources(self, orders: Sequence[Tensor]) -> Tensor:
        """Which entry goes where, (size,), with channel `orders[p][c]` of piece p in the place of its channel c."""
        found = torch.arange(self.size)
        for piece, order in enumerate(orders):
            found[self.places[:, piece]] = self.places[:, piece, order.cpu()]
        return found


@dataclass(frozen=True)
class Layout:
    """What moves together."""

    into: Axis  # the input axis of the matrix that takes the channels in
    out: tuple[Axis, ...]  # axes of what computes them

    @property
    def pieces(self) -> int:
        return self.into.places.shape[1]

    @property
    def length(self) -> int:
        """Channels of a piece."""
        return self.into.places.shape[2]

    def reordered(self, tensors: Mapping[str, Tensor], orders: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """The parameters of the layout in these orders, new tensors; `orders`: of each expert, or of the one matrix there is."""
        found: dict[str, Tensor] = {}
        for axis in (self.into, *self.out):
            tensor = tensors[axis.name]
            sources = [axis.sources(one).to(tensor.device) for one in orders]
            if len(sources) == 1:
                found[axis.name] = tensor.index_select(axis.dim, sources[0])
            else:
                pairs = zip(tensor, sources, strict=True)
                found[axis.name] = torch.stack([one.index_select(axis.dim, some) for one, some in pairs])
        return found

    def score_of(self, piece: int, score: Tensor) -> Tensor:
        """The rows that decide on a piece, (out × copies, length), of a score (out, in) of the matrix that takes it in."""
        return score[:, self.into.places[:, piece].to(score.device)].flatten(0, 1)


def layouts(into: Axis, beside: Mapping[str, tuple[Shape, int]], heads: int, groups: Sequence[int]) -> Iterator[Layout]:
    """The ways in which what enters may have been computed, the likeliest first: to be tried out.

    `into` has no places yet. `beside`: parameter of the same module → its shape, and its output axis, counted from the end.
    `groups`: numbers of key-value heads that the query heads may share.
    """
    width, channels = into.size, torch.arange(into.size)
    whole = Axis(into.name, into.dim, width, channels.view(1, 1, width))
    sizes = {name: shape[dim] for name, (shape, dim) in beside.items()}
    once = {name: channels.view(1, 1, width) for name, size in sizes.items() if size == width}
    twice = [name for name, size in sizes.items() if size == 2 * width]
    pairs = torch.arange(2 * width)
    for both in (pairs.view(2, 1, width), pairs.view(width, 2).T.unsqueeze(1))[: 1 + bool(twice)]:
        places = once | dict.fromkeys(twice, both)
        if any(len(beside[name][0]) > 1 for name in places):
            yield Layout(whole, _axes(places, beside))
    for number in dict.fromkeys(groups):
        if heads and width % heads == 0 and heads % number == 0:
            length = width // heads
            columns = channels.view(number, heads // number, length).transpose(0, 1)
            shared = Axis(into.name, into.dim, width, columns)
            for places in _values(sizes, number, length):
                yield Layout(shared, _axes(places, beside))


def _values(sizes: Mapping[str, int], heads: int, length: int) -> Iterator[dict[str, Tensor]]:
    """Where values may stand, by what each parameter holds of them: alone, or behind queries and keys, of all heads or of each."""
    for name, size in sizes.items():
        if size < heads * length or not name.endswith("weight"):
            continue
        entries = torch.arange(size)
        found = [entries[size - heads * length :].view(1, heads, length)]
        if size > heads * length and size % heads == 0:
            found.append(entries.view(heads, -1)[:, -length:].unsqueeze(0))
        bias = f"{name.removesuffix('weight')}bias"
        names = [name, bias] if sizes.get(bias) == size else [name]
        for places in found:
            yield dict.fromkeys(names, places)


def _axes(places: Mapping[str, Tensor], beside: Mapping[str, tuple[Shape, int]]) -> tuple[Axis, ...]:
    return tuple(Axis(name, beside[name][1], beside[name][0][beside[name][1]], where) for name, where in places.items())
