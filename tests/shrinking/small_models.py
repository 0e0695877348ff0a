"""Random models, shrunk on random windows, and what plain transformers makes of the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import llmsparse
from tests.architectures import VOCABULARY, random_model

WINDOWS, LENGTH = 20, 16


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """The model, and beside it random windows to calibrate on."""
    model.save_pretrained(folder / "model", max_shard_size="40KB")
    ids = torch.randint(3, VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, folder / "windows.safetensors")
    return folder


def random_folder(config: PretrainedConfig, folder: Path) -> Path:
    return saved(random_model(config), folder)


def shrink(folder: Path, **keys: Any) -> llmsparse.ShrinkReport:
    """What lies in `folder` made smaller, into `folder/out`."""
    common = {"model": str(folder / "model"), "output": str(folder / "out"), "device": "cpu"}
    text = {"calibration": str(folder / "windows.safetensors"), "calibration_samples": 12, "batch_size": 3}
    return llmsparse.shrink(**common | text | keys)


def load(folder: Path) -> Any:
    """By plain transformers, which must find nothing missing, unexpected or of another shape; it writes a few tokens."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert written.shape == (1, 7)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of two windows, (2, tokens, vocabulary)."""
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    return model(ids).logits
