"""Stage `info`: versions, the device, and the bandwidth that it reaches."""

from __future__ import annotations

import statistics
import sys
from importlib import metadata

import torch

from eval.gpu_session.record import DEVICE, DRY, say
from eval.gpu_session.timing import once

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "pydantic",
    "pytest",
)


def info() -> None:
    say("info", python=sys.version.split()[0], **{name: version(name) for name in PACKAGES})
    if DRY:
        return
    about, lt = torch.cuda.get_device_properties(0), torch.backends.cusparselt
    say("info", device=about.name, sms=about.multi_processor_count, l2=about.L2_cache_size, memory=about.total_memory,
        cuda=torch.version.cuda, cusparselt=lt.is_available() and lt.version())  # fmt: skip
    source = torch.ones(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    copy = statistics.median(once(lambda: target.copy_(source)) for _ in range(15))
    read = statistics.median(once(lambda: source.sum()) for _ in range(15))
    say("info", copy_gb_s=2 * source.nbytes / copy / 1e3, read_gb_s=source.nbytes / read / 1e3)


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
