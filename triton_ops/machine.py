"""Can Triton kernels run on this device: one answer for every op."""

from __future__ import annotations

import torch
import triton

CAPABILITY = (8, 0)  # bf16 and asynchronous copies; the kernels are compiled and checked for 8.0, 9.0 and 10.0


def why_no_triton(device: torch.device) -> str | None:
    """Why not, in a few words; None where they can. The interpreter runs them on a CPU."""
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"needs an NVIDIA GPU, the weight is on {device}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    return None
