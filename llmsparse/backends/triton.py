"""The kernels of `triton_ops`, each a backend.

Their modules are imported when a GPU asks for them: Triton takes a second, and cannot be imported everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from llmsparse.backends.protocol import WeightSpec
from llmsparse.formats.bitmask import Bitmask


@dataclass(frozen=True)
class LaidOut:
    """A weight as a kernel reads it, and which of its places are stored: their layouts add places and drop zeros."""

    weight: Any
    places: Bitmask  # emptied, in the memory of the CPU: it is for saving only


@dataclass(frozen=True)
class TritonOp:
    """The op module of `triton_ops` that is called as the backend, with `why_not`, `prepare`, `linear` and `restore`."""

    name: str
    most: int  # rows of activations
    pattern: str | None = None  # the only pattern that its layout holds
    compiles: bool = True  # its kernels are torch ops
    exact: bool = True
    formats: tuple[str, ...] = ("bitmask",)

    def why_not(self, spec: WeightSpec) -> str | None:
        if spec.device.type != "cuda":
            return f"needs an NVIDIA GPU; the device is {spec.device}"
        if self.pattern is not None and spec.pattern != self.pattern:
            return f"for {self.pattern} weights, this one is {spec.pattern}"
        for package in ("triton", "triton_ops"):
            if find_spec(package) is None:
                return f"{package} is not installed"
        return self._op.why_not(spec.shape[-2:], spec.dtype, spec.device, 1)

    def wrong(self, device: torch.device) -> str | None:
        return import_module("triton_ops.selftest").wrong(self.name, device)

    def tokens(self, spec: WeightSpec) -> int | None:
        return self.most

    def prepare(self, packed: Bitmask, spec: WeightSpec) -> LaidOut:
        return LaidOut(self._op.prepare(packed.unpack()), packed.emptied().moved(torch.device("cpu")))

    def run(self, prepared: LaidOut, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], prepared.places.shape[-2])
        y: Tensor = self._op.linear(x.reshape(-1, x.shape[-1]), prepared.weight, bias)
        return y.view(*x.shape[:-1], -1)

    def dense(self, prepared: LaidOut) -> Tensor:
        return self._op.restore(prepared.weight)

    borrow = dense

    def restore(self, prepared: LaidOut) -> Bitmask:
        return prepared.places.filled(self.dense(prepared))

    @property
    def _op(self) -> Any:
        return import_module(f"triton_ops.{self.name}")
