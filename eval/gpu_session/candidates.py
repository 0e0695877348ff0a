"""What is timed side by side for a weight (N, K) and M tokens: dense, cuSPARSELt, the kernels, other cuts of them, and parts
of them, which say where their time goes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from eval.gpu_session.record import DEVICE, DRY
from triton_ops import bitmask, join24, mma24, select24, sell, split24
from triton_ops.mask24 import mask24
from triton_ops.mma24_kernel import launch, run
from triton_ops.mma24_plan import Plan, plan
from triton_ops.pack_x import pack_x
from triton_ops.splitk import parts_for


class Candidate(NamedTuple):
    weight: str  # "2:4", or the share of zeros
    prepare: Callable[[Tensor], Any]
    product: Callable[[Tensor, Any], Tensor]  # x (M, K) and what `prepare` made → (M, N)
    whole: bool = True  # otherwise part of a product, whose result is none


def weight_of(kind: str, n: int, k: int, seed: int = 0) -> Tensor:
    """bf16 (N, K): random, 2:4 or with that share of zeros."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, device=DEVICE).bfloat16()
    keep = mask24(weight) if kind == "2:4" else torch.rand(n, k, generator=generator, device=DEVICE) > float(kind)
    return weight.masked_fill(~keep, 0)


def error_of(y: Tensor, x: Tensor, weight: Tensor) -> float:
    wanted = x.double() @ weight.double().T
    return float((y.double() - wanted).norm() / wanted.norm())


def candidates(n: int, k: int, m: int) -> dict[str, Candidate]:
    found = {"dense": Candidate("2:4", itself, linear), "dense-70": Candidate("0.7", itself, linear)}
    if not DRY and torch.backends.cusparselt.is_available():
        found["cusparselt"] = Candidate("2:4", torch.sparse.to_sparse_semi_structured, linear)
    found["mma24"] = Candidate("2:4", mma24.prepare, mma24.linear)
    for cut in cuts(n, k, m):
        name = f"mma24 {cut.tiles}.{cut.warps}.{cut.group}/{cut.parts}" + ("" if cut.direct else " +pack_x")
        found[name] = Candidate("2:4", mma24.prepare, partial(two_of_four, cut=cut))
    found["split24"] = Candidate("0.7", split24.prepare, split24.linear)
    if m == 1:
        found["select24"] = Candidate("2:4", select24.prepare, select24.linear)
        for cut in (Plan(1, 4, 2, True, 1), Plan(1, 8, 4, True, 1), Plan(1, 8, 2, True, 2))[: 1 if DRY else None]:
            if fits(cut, k):
                name = f"split24 {cut.tiles}.{cut.warps}.{cut.group}/{cut.parts}"
                found[name] = Candidate("0.7", split24.prepare, partial(split, cut=cut))
    found["bitmask-70"] = Candidate("0.7", bitmask.prepare, bitmask.linear)
    if m <= 4:
        found |= {
            f"sell-{share[2:]}0": Candidate(share, sell.prepare, sell.linear) for share in ("0.5", "0.6", "0.7", "0.8")
        }
    if m >= 16:
        found["join24"] = Candidate("2:4", join24.prepare, join24.linear)
    return found | parts_of_products(n, k, m)


def cuts(n: int, k: int, m: int) -> list[Plan]:
    """Plans other than the one that `mma24` has for this shape."""
    if m > 8:
        some = [Plan(2, 4, 2, False, 1), Plan(2, 4, 2, False, 2), Plan(2, 8, 2, False, 2), Plan(1, 8, 2, False, 1)]
    else:
        some = [Plan(tiles, warps, group, True, 1) for tiles in (1, 2) for warps in (4, 8) for group in (2, 4)]
        some += [Plan(1, 16, 2, True, 1), Plan(1, 4, 4, True, 2), Plan(2, 4, 2, True, 2), Plan(1, 8, 2, False, 1)]
    return [cut for cut in some if fits(cut, k) and cut != plan(n, k, m)][: 2 if DRY else None]


def fits(cut: Plan, k: int) -> bool:
    return DRY or -(-k // 256) >= cut.warps * cut.parts


def parts_of_products(n: int, k: int, m: int) -> dict[str, Candidate]:
    cut, sum_of = plan(n, k, m), torch.zeros(8, device=DEVICE)
    found = {
        "(an empty launch)": Candidate("2:4", itself, lambda x, held: sum_of.add_(1), False),
        "(mma24 first pass)": Candidate("2:4", mma24.prepare, partial(first_pass, cut=cut), False),
    }
    if m > 1:
        parts = torch.zeros(cut.parts, m, n, device=DEVICE)
        found["(split24 second pass)"] = Candidate("0.7", split24.prepare, partial(second_pass, parts=parts), False)
    if m > 8:
        found["(pack_x)"] = Candidate("2:4", itself, lambda x, held: pack_x(x, -(-m // 8), -(-k // 256)), False)
    return found


def itself(weight: Tensor) -> Tensor:
    return weight


def two_of_four(x: Tensor, packed: mma24.Fragments24, cut: Plan) -> Tensor:
    y = x.new_empty(len(x), packed.shape[0])
    run(x, packed.vals, packed.meta, None, y, cut)
    return y


def split(x: Tensor, packed: split24.Split24, cut: Plan) -> Tensor:
    y = x.new_empty(len(x), packed.shape[0])
    run(x, packed.two.vals, packed.two.meta, None, y, cut, (packed.entries, packed.offsets))
    return y


def first_pass(x: Tensor, packed: mma24.Fragments24, cut: Plan) -> Tensor:
    n = packed.shape[0]
    y = x.new_empty(len(x), n) if cut.parts == 1 else parts_for(x, n, cut.parts)
    launch(x, packed.vals, packed.meta, None, y, cut)
    return y


def second_pass(x: Tensor, packed: split24.Split24, parts: Tensor) -> Tensor:
    y = x.new_empty(len(x), packed.shape[0])
    split24.add_residual(x, parts, packed.entries, packed.offsets, None, y)
    return y
