"""Tiny packed mixtures whose experts stay on disk."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import random_model, tiny_config, windows
from safetensors.torch import save_file
from torch import Tensor

import llmsparse
from llmsparse.errors import RecipeError
from llmsparse.inference.load import load_model

CPU = torch.device("cpu")
FEW = "125KB"  # holds some of the tiny experts, beside what is read into


def model_of(folder: Path, memory: str | int | None = FEW, **options: Any) -> Any:
    return load_model(folder, **{"device": CPU, "backend": "cpu-bitmask", "expert_memory": memory} | options)


@torch.no_grad()
def logits(model: Any, *shape: int) -> Tensor:
    (ids,) = windows(shape or (2, 9))
    return model(ids, use_cache=False).logits


def least(folder: Path) -> int:
    """The bytes that a refusal asks for."""
    with pytest.raises(RecipeError) as refused:
        model_of(folder, 1)
    found = re.search(r"give it ([\d.]+) kB", str(refused.value))
    assert found is not None
    return round(float(found[1]) * 1000)


def few_bits_of(root: Path, **shape: int) -> Path:
    random_model(tiny_config("mixtral", vocab_size=512, **shape)).save_pretrained(root / "dense")
    save_file({"input_ids": torch.randint(0, 512, (4, 32))}, root / "ids.safetensors")
    llmsparse.quantize(
        str(root / "dense"), bits=2.5, output=root / "few", calibration=str(root / "ids.safetensors"),
        calibration_samples=4, device="cpu",
    )  # fmt: skip
    return root / "few"


def threads() -> set[str]:
    """Those that read experts."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            found |= {task.name} if (task / "comm").read_text() == "experts\n" else set()
    return found


def gone(reading: set[str]) -> bool:
    until = time.monotonic() + 10
    while reading & threads() and time.monotonic() < until:
        time.sleep(0.01)
    return not reading & threads()
