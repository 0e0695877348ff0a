"""The tensors of one factorized block as its container stores them.

Every factor is folded into the down projections: `active`, because a container weighs each expert that runs by
1/active, and 2 for a shared expert behind a sigmoid of zero. Experts are filled up with zero neurons to one width.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.factorization.containers import Container
from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.router import Router
from llmsparse.factorization.split import Layout, Split
from llmsparse.storage.shard import is_finite

Spec = tuple[tuple[int, ...], torch.dtype]
PROJECTIONS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


class ExpertTensors(NamedTuple):
    """Where the three matrices of an expert go: names within a block, width, and the factor on its down projection."""

    gate: str
    up: str
    down: str
    width: int
    factor: float


def slots(container: Container, layout: Layout) -> Iterator[ExpertTensors]:
    """The shared slot, where there is one, and then every routed expert."""
    if layout.shared:
        assert container.shared is not None
        gate, up, down = (container.shared + name for name in PROJECTIONS)
        yield ExpertTensors(gate, up, down, layout.shared * layout.width, 2.0 if container.shared_gate else 1.0)
    for expert in range(layout.routed):
        gate, up, down = (name.format(expert) for name in container.experts)
        yield ExpertTensors(gate, up, down, layout.width, float(layout.active))


def specs(container: Container, layout: Layout, prefix: str, width: int, dtype: torch.dtype) -> dict[str, Spec]:
    """Shape and dtype of what `tensors` gives for an FFN of this width (its inputs), keys beginning with `prefix`."""
    found: dict[str, Spec] = {prefix + container.router: ((layout.routed, width), dtype)}
    if container.bias:
        found[prefix + container.bias] = ((layout.routed,), torch.float32)
    if container.shared_gate:
        found[prefix + container.shared_gate] = ((1, width), dtype)
    for slot in slots(container, layout):
        found[prefix + slot.gate] = found[prefix + slot.up] = ((slot.width, width), dtype)
        found[prefix + slot.down] = ((width, slot.width), dtype)
    return found


def tensors(
    container: Container, layout: Layout, prefix: str, ffn: FFN, split: Split, router: Router, dtype: torch.dtype
) -> dict[str, Tensor]:
    """On-disk key → tensor on the CPU, in `dtype` but for the router's bias, which is fp32.

    NumericalError where a value, all factors folded in, is beyond the dtype.
    """
    width = ffn.gate.shape[1]
    found = {prefix + container.router: router.weight.to("cpu", dtype)}
    if container.bias:
        found[prefix + container.bias] = router.bias.float().cpu()
    if container.shared_gate:
        found[prefix + container.shared_gate] = torch.zeros(1, width, dtype=dtype)
    members = [split.shared, *split.routed] if layout.shared else [*split.routed]
    for slot, neurons in zip(slots(container, layout), members, strict=True):
        chosen = neurons.to(ffn.gate.device)
        found[prefix + slot.gate] = _padded(ffn.gate[chosen], slot.width, dtype)
        found[prefix + slot.up] = _padded(ffn.up[chosen], slot.width, dtype)
        down = (slot.factor * ffn.down[:, chosen]).T  # (neurons, width)
        found[prefix + slot.down] = _padded(down, slot.width, dtype).T.contiguous()
    for key, tensor in found.items():
        if not is_finite(tensor):
            name = str(tensor.dtype).removeprefix("torch.")
            raise NumericalError(
                f"{key}: holds values that {name}, in which the model is stored, does not reach; start from a checkpoint in "
                "bfloat16 or float32, or use --no-refit"
            )
    return found


def _padded(rows: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(count, ...) on the CPU: the rows, then zeros."""
    full = torch.zeros(count, *rows.shape[1:], dtype=dtype)
    full[: len(rows)] = rows.cpu()
    return full
