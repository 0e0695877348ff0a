"""What may be timed: a backend that can run a weight here, does not fail at it, and gives the product that dense gives.

The time of a wrong product is worth nothing, and saved it would make `auto` run it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llmsparse.backends import BACKENDS, WeightSpec
from llmsparse.backends.choice import why_not
from llmsparse.errors import one_line
from llmsparse.formats import PackedTensor, restore

BOUND = {torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}  # rms of the difference of two products, each rounded once
EXACT = 2e-5  # the same where nothing is rounded but sums
ROUNDED = 1e-2  # where the input is rounded to 8 bits


def laid_out(name: str, packed: PackedTensor, spec: WeightSpec, copies: int, batches: Sequence[int]) -> list[Any] | str:
    """Copies of a weight as a backend reads it, or why it must not be timed, in a few words."""
    backend = BACKENDS[name]
    reason = why_not(name, spec) or backend.wrong(spec.device)
    if reason is not None:
        return reason
    try:
        prepared = [backend.prepare(_copy(packed), spec) for _ in range(copies)]
        return differs(name, prepared[0], packed, spec, batches) or prepared
    except Exception as error:  # whatever a compiler or a driver may raise: the others' figures stand
        return f"fails: {type(error).__name__}: {one_line(error)}"


def differs(name: str, prepared: Any, packed: PackedTensor, spec: WeightSpec, batches: Sequence[int]) -> str | None:
    """How a backend's products differ from dense ones, for every batch that it takes; None if they do not."""
    backend = BACKENDS[name]
    bound = BOUND.get(spec.dtype, EXACT) + (0 if backend.exact else ROUNDED)
    weight, most = packed.unpack(), backend.tokens(spec)
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        if most is not None and batch > most:
            continue
        x = torch.randn(batch, spec.shape[-1], generator=generator).to(spec.device, spec.dtype)
        with torch.inference_mode():
            wanted = torch.nn.functional.linear(x, weight).float()
            gap = torch.linalg.vector_norm(backend.run(prepared, x, None) - wanted)
            error = float(gap / torch.linalg.vector_norm(wanted).clamp_min(1e-30))
        if not error <= bound:  # NaN too
            return f"wrong: off by {error:.1e} for {batch} tokens, at most {bound:.0e} is right"
    return None


def _copy(packed: PackedTensor) -> PackedTensor:
    tensors = {suffix: tensor.clone() for suffix, tensor in packed.tensors().items()}
    return restore("the copy", packed.describe(), tensors, packed.dtype)
