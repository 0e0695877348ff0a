"""Stages `right` and `times`: each kernel against float64, then all of them side by side."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from eval.gpu_session.candidates import candidates, error_of, weight_of
from eval.gpu_session.record import DEVICE, DRY, attempt, say, shape_of
from eval.gpu_session.timing import by_turns, copied, graphed, middle
from triton_ops import mma24, reference, selftest

SHAPES = ("4096x14336", "4096x4096")  # of `right`: it compiles what is timed; 28672x8192 takes the same variants
CACHED = 400_000_000  # bytes that a round must read, to find none of them in a cache
MOST = 2**-7 if DRY else 5e-3  # bf16 errs by 2⁻⁸ where it rounds; the interpreter cuts off, which errs by up to 2⁻⁷
if DRY:
    selftest.SHAPE = (16, 260)  # the interpreter takes its time


def right(op: str, tokens: str = "1,8,16,32") -> None:
    """One op on the shapes that are timed; first by its own self-test, where one token is among these. `experts` is the
    mixture's."""
    if op == "experts":
        say("right", op=op, wrong=selftest.experts_wrong(DEVICE))
        return
    if "1" in tokens.split(","):
        say("right", op=op, wrong=selftest.wrong(op, DEVICE))
        if op == "mma24":
            order_of_metadata()
    for name in SHAPES[:1] if DRY else SHAPES:
        n, k = shape_of(name)
        packs: dict[Any, Any] = {}
        for m in map(int, tokens.split(",")):
            x = torch.randn(m, k, device=DEVICE).bfloat16()
            for label, (kind, prepare, product, whole) in candidates(n, k, m).items():
                if not label.lstrip("(").startswith(op):
                    continue
                with attempt("right", op=op, shape=name, m=m, kernel=label):
                    if kind not in packs:
                        packs[kind] = weight_of(kind, n, k)
                    if (kind, prepare) not in packs:
                        packs[kind, prepare] = prepare(packs[kind])
                    y = product(x, packs[kind, prepare])
                    if whole:
                        error = error_of(y, x, packs[kind])
                        say("right", op=op, shape=name, m=m, kernel=label, error=error, ok=error < MOST)


def order_of_metadata() -> None:
    """Is a wrong product wrong in the layout, in the order of metadata, or for some numbers of tokens alone?"""
    x, weight = torch.randn(32, 512, device=DEVICE).bfloat16(), weight_of("2:4", 64, 512)
    packed = mma24.prepare(weight)
    swapped = packed._replace(meta=packed.meta[:, :, torch.arange(32, device=DEVICE) ^ 2].contiguous())
    for m in (1, 9) if DRY else (1, 2, 7, 8, 9, 16, 17, 32):
        wanted = reference.linear(x[:m], weight).double()
        found = [mma24.linear(x[:m], held).double() for held in (packed, swapped)]
        errors = [float((one - wanted).norm() / wanted.norm()) for one in found]
        say("right", op="mma24", m=m, error=errors[0], error_if_metadata_were_swapped=errors[1], ok=errors[0] < MOST)


def times(name: str, tokens: str) -> None:
    """All candidates for one shape by turns; whichever errs more than dense does, by half, is not timed."""
    n, k = shape_of(name)
    copies = 1 if DRY else max(2, -(-CACHED // (n * k)))  # a packed weight has at least a byte for each two
    weights: dict[str, torch.Tensor] = {}
    packs: dict[Any, list[Any]] = {}
    for m in map(int, tokens.split(",")):
        x = torch.randn(m, k, device=DEVICE).bfloat16()
        graphs, errors = {}, {}
        for label, (kind, prepare, product, whole) in candidates(n, k, m).items():
            with attempt("times", shape=name, m=m, kernel=label):
                if kind not in weights:
                    weights[kind] = weight_of(kind, n, k)
                weight = weights[kind]
                if (kind, prepare) not in packs:
                    packs[kind, prepare] = [prepare(weight)]
                    packs[kind, prepare] += [
                        prepare(weight) if label == "cusparselt" else copied(packs[kind, prepare][0])
                        for _ in range(copies - 1)
                    ]
                held = packs[kind, prepare]
                if whole:
                    errors[label] = error_of(product(x, held[0]), x, weight)
                    most = 1.5 * error_of(linear(x, weight), x, weight)
                    if not errors[label] <= most and not DRY:  # NaN too; the interpreter cuts off instead of rounding
                        say("times", shape=name, m=m, kernel=label, wrong=errors[label], at_most=most)
                        continue
                graphs[label] = graphed([partial(product, x, one) for one in held])
        taken = by_turns(graphs)
        for label, found in taken.items():
            versus = middle(taken["dense"]) / middle(found)
            say("times", shape=name, m=m, kernel=label, us=round(middle(found) / copies, 2),
                p20=round(found[len(found) // 5] / copies, 2), vs_dense=round(versus, 3), error=errors.get(label))  # fmt: skip
        del graphs
        if not DRY:
            torch.cuda.empty_cache()
