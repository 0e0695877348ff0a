"""Stage `decode`: a step of a Llama-3-8B for one sequence as one CUDA graph, 1024 tokens in the cache: dense and by each
kernel, with q, k, v and gate, up apart or stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.gpu_session.candidates import weight_of
from eval.gpu_session.record import DEVICE, DRY, attempt, say
from eval.gpu_session.timing import copied, graphed, middle, once
from triton_ops import stacked

WIDTH, INNER, HEADS, GROUPS, LAYERS, PAST = (32, 32, 4, 2, 1, 16) if DRY else (4096, 14336, 32, 8, 32, 1024)
HEAD = WIDTH // HEADS
ROWS = {"q": WIDTH, "k": GROUPS * HEAD, "v": GROUPS * HEAD, "o": WIDTH, "gate": INNER, "up": INNER, "down": WIDTH}
APART, STACKED = ("q", "k", "v", "o", "gate", "up", "down"), ("q k v", "o", "gate up", "down")
RUNS = [("dense", "0.0"), ("mma24", "2:4"), ("split24", "0.7"), ("sell", "0.7"), ("bitmask", "0.7")]

Layer = dict[str, Any]  # names of weights that are one, with blanks between → what holds them
Products = Callable[[Tensor, Any], tuple[Tensor, ...]]


def decode() -> None:
    base = None
    for kernel, kind in RUNS:
        for groups in (APART, STACKED):
            name = f"{kernel} stacked" if groups is STACKED else kernel
            with attempt("decode", run=name):
                taken, held = step_time(kernel, kind, groups)
                base = base or taken
                say("decode", run=name, ms=round(taken / 1e3, 3), tokens_s=round(1e6 / taken, 1),
                    vs_dense=round(base / taken, 3), weights_gb=round(held / 1e9, 2))  # fmt: skip


def step_time(kernel: str, kind: str, groups: tuple[str, ...]) -> tuple[float, int]:
    """Microseconds of a step, and bytes of its weights."""
    if not DRY:
        torch.cuda.empty_cache()
    before = 0 if DRY else torch.cuda.memory_allocated()
    first = {group: prepare(kernel, [drawn(kind, part) for part in group.split()]) for group in groups}
    layers = [{group: copied(one) for group, one in first.items()} for _ in range(LAYERS)]
    del first
    held = 0 if DRY else torch.cuda.memory_allocated() - before
    cache = [torch.randn(2, 1, GROUPS, PAST, HEAD, device=DEVICE).bfloat16() for _ in range(LAYERS)]
    x = torch.randn(1, WIDTH, device=DEVICE).bfloat16()
    products = dense if kernel == "dense" else stacked.linear
    with torch.inference_mode():
        replay = graphed([lambda: step(x, layers, cache, products)])
        found = sorted(once(replay) for _ in range(1 if DRY else 22))
    return middle(found), held


def drawn(kind: str, part: str) -> Tensor:
    inputs = INNER if part == "down" else WIDTH
    return weight_of(kind, ROWS[part], inputs, seed=len(part)) / inputs**0.5


def prepare(kernel: str, weights: list[Tensor]) -> Any:
    if kernel == "dense":
        return Dense(torch.cat(weights), tuple(map(len, weights)))
    return stacked.prepare(kernel, weights)


class Dense(NamedTuple):
    weight: Tensor
    rows: tuple[int, ...]


def dense(x: Tensor, held: Dense) -> tuple[Tensor, ...]:
    return F.linear(x, held.weight).split(held.rows, dim=1)


def step(x: Tensor, layers: list[Layer], cache: list[Tensor], products: Products) -> Tensor:
    """x (1, D) through all layers, the last place of each cache written anew."""
    norm = torch.ones(WIDTH, device=x.device, dtype=x.dtype)
    for layer, (keys, values) in zip(layers, cache, strict=True):
        q, k, v = through(F.rms_norm(x, (WIDTH,), norm), layer, ("q", "k", "v"), products)
        keys[:, :, -1], values[:, :, -1] = k.view(1, GROUPS, HEAD), v.view(1, GROUPS, HEAD)
        seen = F.scaled_dot_product_attention(q.view(1, HEADS, 1, HEAD), keys, values, enable_gqa=True)
        x = x + through(seen.reshape(1, WIDTH), layer, ("o",), products)[0]
        gate, up = through(F.rms_norm(x, (WIDTH,), norm), layer, ("gate", "up"), products)
        x = x + through(F.silu(gate) * up, layer, ("down",), products)[0]
    return x


def through(x: Tensor, layer: Layer, names: tuple[str, ...], products: Products) -> tuple[Tensor, ...]:
    """x through weights of the same inputs, that are one or apart."""
    together = " ".join(names)
    if together in layer:
        return products(x, layer[together])
    return tuple(products(x, layer[name])[0] for name in names)
