"""The product of a packed layer that leaves inputs out: by the kernel that reads columns, where it can run the weight."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmsparse.backends import WeightSpec
from llmsparse.backends.choice import UNPACKING
from llmsparse.backends.cpu_columns import COLUMNS, TOKENS
from llmsparse.inference import graphed
from llmsparse.inference.gradient import wants_gradient
from llmsparse.models.thresholds import Applied


def by_kernel(matrix: Any, rule: Applied, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """x (..., in), of which inputs are left out, · Wᵀ + bias (`rule.bias`); None where another must run it. `matrix` is a PackedMatrix."""
    if torch.compiler.is_compiling() or matrix.backend is not COLUMNS or x.dtype != matrix.dtype:
        return None
    few = 0 < x.numel() <= TOKENS * x.shape[-1]
    if not few or torch.is_autocast_enabled("cpu") or wants_gradient(x, bias):
        return None
    return COLUMNS.run_cut(matrix.prepared, rule.cut, x, bias)


def by_columns(matrix: Any) -> Any:
    """The same PackedMatrix as layers hold it that leave inputs out: by columns, where the kernel for these can run it."""
    packed = matrix.packed()
    spec = WeightSpec.of(packed, matrix.transposed, matrix.choice.whole)
    if COLUMNS.why_not(spec) is not None or matrix.choice.backend in UNPACKING:
        return matrix
    made, because = copy(matrix), "only columns are read whose inputs count"
    made.backend, made.prepared, made.copy, made.runs_many = COLUMNS, COLUMNS.prepare(packed, spec), None, False
    made.choice = replace(matrix.choice, backend=COLUMNS.name, tokens=TOKENS, because=because)
    made.handle = graphed.name(made)
    return made


def moved(rule: Applied, fn: Callable[[Tensor], Tensor]) -> Applied:
    """The rule of a layer after `model.to(...)`: its scores stay in fp32."""
    device = fn(torch.empty(0)).device
    norms, centre = (None if held is None else held.to(device) for held in (rule.cut.norms, rule.cut.centre))
    return Applied(replace(rule.cut, norms=norms, centre=centre), None if rule.added is None else fn(rule.added))
