"""What a kernel needs of a weight, a device and a batch: asked before (`unmet`), checked when it runs (`check`), and
what it needs of x put right (`aligned`)."""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

from triton_ops.pack24 import DTYPES

INTERPRETED = bool(knobs.runtime.interpret)  # Triton decides once, when it is imported
PTX = not INTERPRETED and torch.version.hip is None  # kernels may name instructions of NVIDIA's


def unmet(
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    m: int,
    *,
    most: int | None = None,
    widest: int | None = None,
    capability: tuple[int, int] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    multiple: int = 4,
) -> str | None:
    """Why kernel `name` cannot multiply M tokens with a packed weight (N, K) here, in a line, or None.

    `most` tokens, `widest` K, least compute `capability` of an NVIDIA GPU, `dtypes` and what K must be a `multiple` of
    are the kernel's limits.
    """
    if dtype not in dtypes:
        names = [str(one).removeprefix("torch.") for one in dtypes]
        return f"{name} takes {', '.join(names[:-1])} or {names[-1]}, got {dtype}"
    if shape[1] % multiple:
        return f"{name} needs K a multiple of {multiple}, got {shape[1]}"
    if widest is not None and shape[1] > widest:
        return f"{name} takes K up to {widest}, got {shape[1]}"
    if m < 1 or (most is not None and m > most):
        return f"{name} takes 1 to {most} tokens, got {m}" if most != 1 else f"{name} takes one token, got {m}"
    if device.type != "cuda":
        return f"{name} needs a CUDA device, got {device.type}"
    if capability is not None:
        if torch.version.hip:
            return f"{name} needs an NVIDIA GPU: it uses an instruction of theirs"
        if torch.cuda.get_device_capability(device) < capability:
            found = torch.cuda.get_device_capability(device)
            return (
                f"{name} needs compute capability {capability[0]}.{capability[1]}, this GPU has {found[0]}.{found[1]}"
            )
    return None


def check(
    name: str,
    x: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    bias: Tensor | None,
    *,
    most: int | None = None,
) -> None:
    """ValueError unless x (M, K) fits a weight of this shape and dtype, and there is something to run a kernel."""
    n, k = shape
    if x.ndim != 2 or x.shape[1] != k or (most is not None and len(x) > most):
        wanted = f"(M, {k})" if most is None else f"(M, {k}) with M up to {most}"
        raise ValueError(f"{name}: x is {tuple(x.shape)}, wanted {wanted}")
    if x.dtype != dtype:
        raise ValueError(f"{name}: x is {x.dtype}, the weight {dtype}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"{name}: bias is {tuple(bias.shape)}, wanted ({n},)")
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(f"{name} needs a CUDA device, x is on the CPU")


def aligned(x: Tensor) -> Tensor:
    """x in row order and at an address that is a multiple of 16, as kernels read several inputs as one number."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
