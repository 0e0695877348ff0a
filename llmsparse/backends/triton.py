"""The kernels of `triton_ops`, each a backend: a 2:4 weight on sparse tensor cores, an unstructured one in its bitmask.

Their modules are imported when a GPU asks for them: Triton takes a second, and cannot be imported everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from llmsparse.backends.protocol import WeightSpec
from llmsparse.formats.bitmask import Bitmask
from llmsparse.formats.slicing import moved


@dataclass(frozen=True)
class TritonOp:
    """An op module of `triton_ops`, called as the backend, with `prepare`, `linear`, `restore`, `keep` and `why_not`."""

    name: str
    most: int  # rows of activations
    pattern: str | None = None  # the only pattern that its layout holds
    compiles: bool = True  # its kernels are registered as torch ops

    def why_not(self, spec: WeightSpec) -> str | None:
        if spec.device.type != "cuda":
            return f"needs an NVIDIA GPU; the device is {spec.device}"
        if self.pattern is not None and spec.pattern != self.pattern:
            return f"for {self.pattern} weights, this one is {spec.pattern}"
        for package in ("triton", "triton_ops"):
            if find_spec(package) is None:
                return f"{package} is not installed"
        return self._op.why_not(spec.shape[-2:], spec.dtype, spec.device, 1)

    def tokens(self, spec: WeightSpec) -> int | None:
        return self.most

    def prepare(self, packed: Bitmask, spec: WeightSpec) -> Any:
        return self._op.prepare(packed.unpack(), packed.keep())

    def run(self, prepared: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._op.linear(x.reshape(-1, x.shape[-1]), prepared, bias)
        return y.view(*x.shape[:-1], -1)

    def dense(self, prepared: Any) -> Tensor:
        return self._op.restore(prepared)

    borrow = dense

    def restore(self, prepared: Any) -> Bitmask:
        weight: Tensor = self._op.restore(prepared)
        keep: Tensor = self._op.keep(prepared)
        packed = Bitmask.pack(weight.cpu(), self.pattern or "unstructured", keep.cpu())
        return moved(packed, weight.device)

    @property
    def _op(self) -> Any:
        return import_module(f"triton_ops.{self.name}")
