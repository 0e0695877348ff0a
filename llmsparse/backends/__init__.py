"""How a packed weight is run: each backend is a kernel with a layout of its own, made from the neutral one at load.

A backend is one file and one line in BACKENDS. `choice.py` says which of them runs a weight.
"""

from __future__ import annotations

from llmsparse.backends.cpu_bitmask import CpuBitmask
from llmsparse.backends.cpu_dense import CpuDense
from llmsparse.backends.cpu_nested import CpuNested
from llmsparse.backends.cusparselt import CuSparseLt
from llmsparse.backends.dense import Dense, DenseLowMemory
from llmsparse.backends.protocol import Backend, WeightSpec
from llmsparse.backends.triton import TritonOp
from llmsparse.backends.triton_nested import TritonNested

__all__ = ["BACKENDS", "Backend", "WeightSpec"]

BACKENDS: dict[str, Backend] = {
    "dense": Dense(),
    "dense-lowmem": DenseLowMemory(),
    "cpu-bitmask": CpuBitmask(),
    "cpu-nested": CpuNested(),
    "cpu-nested-int8": CpuNested("cpu-nested-int8", int8=True),
    "cpu-dense": CpuDense(),
    "mma24": TritonOp("mma24", most=32, pattern="2:4"),
    "split24": TritonOp("split24", most=32),
    "select24": TritonOp("select24", most=1, pattern="2:4"),
    "bitmask": TritonOp("bitmask", most=32),
    "sell": TritonOp("sell", most=4),
    "nested": TritonNested(),
    "cusparselt": CuSparseLt(),
}
