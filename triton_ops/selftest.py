"""Is a kernel right on this device? Asked once for each, before it is used.

`mma24` and `split24` stand on how the compiler deals elements to threads and on the order of an instruction's metadata,
neither of which an update must keep. So a small product is compared with the reference when a device is first used, and
who packs weights takes the next kernel where it differs, with the reason in hand: nothing here is silent.

    name, refused = first_right(("mma24", "join24"), device)     # {"mma24": "mma24 is wrong on cuda:0: …"} → say so
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module

import torch

from triton_ops import reference

KERNELS = {
    "mma24": (1, 8, 16, 32),
    "split24": (1, 8, 32),
    "select24": (1,),
    "join24": (1, 16, 65),
    "bitmask": (1, 16, 32),
    "sell": (1, 2, 4),
}  # name → tokens tried
UNSTRUCTURED = ("split24", "bitmask", "sell")
BOUND = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # rms against float64; one rounding is 0.0002 and 0.0017
EXPERTS = ((5, 200), (4, 30, 200), (4, 30, 200), (4, 200, 30))  # x, gate, up, down
SHAPE = (80, 4360)  # rows and inputs that fill neither the last tile nor the last block, with more than one part


@cache
def wrong(name: str, device: torch.device) -> str | None:
    """Why kernel `name` must not be used on this device, or None: a product, in both dtypes and for each number of
    tokens, is compared with `reference.linear`. Takes a second (it compiles), and waits for the device: not for a CUDA
    graph. KeyError for a name that is not in KERNELS."""
    tokens, kernel = KERNELS[name], import_module(f"triton_ops.{name}")
    generator = torch.Generator().manual_seed(0)
    for dtype in BOUND:
        weight = torch.randn(SHAPE, generator=generator).to(dtype)
        keep = torch.rand(SHAPE, generator=generator) > 0.7 if name in UNSTRUCTURED else reference.mask24(weight)
        weight = weight.masked_fill(~keep, 0).to(device)
        bias = torch.randn(SHAPE[0], generator=generator).to(device, dtype)
        for m in tokens:
            x = torch.randn(m, SHAPE[1], generator=generator).to(device, dtype)
            try:
                y = kernel.linear(x, kernel.prepare(weight), bias).double()
            except Exception as error:  # whatever a compiler or a driver may raise: the reason is handed on
                return f"{name} fails on {device}: {type(error).__name__}: {str(error).splitlines()[0]}"
            wanted = reference.linear(x, weight, bias).double()
            error = float((y - wanted).norm() / wanted.norm())
            if not error <= BOUND[dtype]:  # NaN too
                return f"{name} is wrong on {device}: error {error:.1e} for {m} tokens in {dtype}, at most {BOUND[dtype]:.0e} is right"
    return None


@cache
def nested_wrong(device: torch.device) -> str | None:
    """The same of `nested`, whose weights are small integers and steps."""
    from triton_ops import nested

    generator = torch.Generator().manual_seed(0)
    for dtype, bound in (BOUND | {torch.float32: 1e-5}).items():
        q = (2 * torch.randn(SHAPE, generator=generator)).round().to(torch.int8)
        steps = torch.rand(SHAPE[0], 2, generator=generator).to(torch.bfloat16)
        group = SHAPE[1] // 2
        weight = reference.nested(q, steps, group, dtype)
        bias = torch.randn(SHAPE[0], generator=generator).to(dtype)
        for m in (1, 2, 8):
            x = torch.randn(m, SHAPE[1], generator=generator).to(dtype)
            wanted = reference.linear(x, weight, bias).double()
            try:
                made = nested.prepare(q.to(device), steps.to(device), group, dtype)
                y = nested.linear(x.to(device), made, bias.to(device)).double().cpu()
            except Exception as error:
                return f"nested fails on {device}: {type(error).__name__}: {str(error).splitlines()[0]}"
            error = float((y - wanted).norm() / wanted.norm())
            if not error <= bound:
                return f"nested is wrong on {device}: error {error:.1e} for {m} tokens in {dtype}, at most {bound:.0e} is right"
    return None


@cache
def experts_wrong(device: torch.device) -> str | None:
    """The same of `expert_gemv`, in its three dtypes: compared with `reference.experts`."""
    from triton_ops.expert_gemv import experts

    generator = torch.Generator().manual_seed(0)
    for dtype, bound in (BOUND | {torch.float32: 1e-5}).items():
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in EXPERTS]
        x, gate, up, down = [tensor.to(device) for tensor in tensors]
        index = torch.randint(-1, len(gate) + 1, (len(x), 2), generator=generator).to(device)
        shares = torch.rand(index.shape, generator=generator).to(device)
        try:
            y = experts(x, gate, up, down, index, shares).double()
        except Exception as error:
            return f"expert_gemv fails on {device}: {type(error).__name__}: {str(error).splitlines()[0]}"
        wanted = reference.experts(x, gate, up, down, index, shares).double()
        error = float((y - wanted).norm() / wanted.norm())
        if not error <= bound:
            return f"expert_gemv is wrong on {device}: error {error:.1e} in {dtype}, at most {bound:.0e} is right"
    return None


def first_right(names: Sequence[str], device: torch.device) -> tuple[str | None, dict[str, str]]:
    """The first of these kernels that is right on this device, or None; and why each one before it is not."""
    refused = dict[str, str]()
    for name in names:
        reason = wrong(name, device)
        if reason is None:
            return name, refused
        refused[name] = reason
    return None, refused
