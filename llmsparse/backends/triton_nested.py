"""`nested`: the op of `triton_ops` for weights of small integers and steps, on a GPU, for few tokens at a time.

No row of the shipped table names it: it has not been timed. It runs where it is asked for, or where `bench --save` finds it faster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from llmsparse.backends.cpu import nested as on_cpu
from llmsparse.backends.protocol import WeightSpec
from llmsparse.formats.nested import Nested


@dataclass(frozen=True)
class LaidOut:
    """A weight as the kernel reads it, and what of the format it does not hold."""

    weight: Any
    frame: Nested  # without tensors


class TritonNested:
    name = "nested"
    formats = ("nested",)
    compiles = True
    exact = True

    def why_not(self, spec: WeightSpec) -> str | None:
        if spec.device.type != "cuda":
            return f"needs an NVIDIA GPU; the device is {spec.device}"
        for package in ("triton", "triton_ops"):
            if find_spec(package) is None:
                return f"{package} is not installed"
        if spec.stored is not None and spec.dtype not in (spec.stored, torch.float32):
            stored, dtype = (str(one).removeprefix("torch.") for one in (spec.stored, spec.dtype))
            return f"for a model in {stored}, as its weights are rounded to, or in float32; it is in {dtype}"
        return self._op.why_not(spec.shape[-2:], spec.dtype, spec.device, 1)

    def wrong(self, device: torch.device) -> str | None:
        return import_module("triton_ops.selftest").nested_wrong(device)

    def tokens(self, spec: WeightSpec) -> int | None:
        return 8

    def prepare(self, packed: Nested, spec: WeightSpec) -> LaidOut:
        here = packed.moved(torch.device("cpu"))
        q = (on_cpu.numbers_of(here) if on_cpu.why_not() is None else here.numbers()).to(packed.device)
        made = self._op.prepare(q, packed.steps, packed.group, packed.stored)
        return LaidOut(made, packed.emptied_of_tensors())

    def run(self, prepared: LaidOut, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], prepared.frame.shape[-2])
        y: Tensor = self._op.linear(x.reshape(-1, x.shape[-1]), prepared.weight, bias)
        return y.view(*x.shape[:-1], -1)

    def dense(self, prepared: LaidOut) -> Tensor:
        return self._op.dense(prepared.weight).to(prepared.frame.dtype)

    borrow = dense

    def restore(self, prepared: LaidOut) -> Nested:
        frame, steps = prepared.frame, prepared.weight.steps
        q = self._op.numbers(prepared.weight).cpu()
        whole = Nested.written(q, steps.cpu(), frame.code, frame.tile_rows, frame.group, frame.stored)
        return replace(whole.moved(steps.device, frame.dtype), step_rows=frame.step_rows)

    @property
    def _op(self) -> Any:
        return import_module("triton_ops.nested")
