"""Stage `experts`: the fused experts beside the dense FFN of the same inner width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.gpu_session.record import DEVICE, DRY, say
from eval.gpu_session.timing import by_turns, graphed, middle
from triton_ops.expert_gemv import experts as run

WIDTH, INNER, COUNT, CHOSEN = (64, 16, 4, 2) if DRY else (4096, 1792, 8, 2)
COPIES = 1 if DRY else 4


def experts() -> None:
    for tokens in (1,) if DRY else (1, 2, 4, 8):
        x = torch.randn(tokens, WIDTH, device=DEVICE).bfloat16()
        sets = [mixture(tokens, seed) for seed in range(COPIES)]
        calls = {"experts": [partial(run, x, *one) for one in sets], "dense": [dense(x, *one[:3]) for one in sets]}
        taken = by_turns({name: graphed(made) for name, made in calls.items()})
        touched = sum(len(one[3].unique()) for one in sets) / COPIES
        for name, found in taken.items():
            time, read = middle(found) / COPIES, 3 * INNER * WIDTH * 2 * (COUNT if name == "dense" else touched)
            say("experts", tokens=tokens, run=name, us=round(time, 2), gb_s=round(read / time / 1e3), chosen=touched,
                vs_dense=round(middle(taken["dense"]) / middle(found), 3))  # fmt: skip


def mixture(tokens: int, seed: int) -> tuple[Tensor, ...]:
    """gate, up (E, N, D), down (E, D, N), index and shares (T, K)."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=DEVICE) / shape[-1] ** 0.5).bfloat16()

    both = draw(COUNT, 2 * INNER, WIDTH)
    rows = [torch.randperm(COUNT, generator=generator, device=DEVICE)[:CHOSEN] for _ in range(tokens)]
    shares = torch.full((tokens, CHOSEN), 1 / CHOSEN, device=DEVICE)
    return both[:, :INNER], both[:, INNER:], draw(COUNT, WIDTH, INNER), torch.stack(rows), shares


def dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Callable[[], Tensor]:
    a, b = (part.reshape(-1, WIDTH).contiguous() for part in (gate, up))
    c = down.transpose(0, 1).reshape(WIDTH, -1).contiguous()
    return lambda: F.linear(F.silu(F.linear(x, a)) * F.linear(x, b), c)
