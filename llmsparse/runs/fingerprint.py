"""What the bytes of a result depend on beside the recipe."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from llmsparse.version import __version__


def machine(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on, beside the versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"threads": torch.get_num_threads(), "device": name}


def versions() -> dict[str, str]:
    return {"llmsparse": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
