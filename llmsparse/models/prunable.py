"""What keeps a whole model from being pruned or packed weight by weight; said before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmsparse.errors import CheckpointError
from llmsparse.models.naming import in_block

if TYPE_CHECKING:
    from llmsparse.models.streamed import StreamedModel

FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def refuse_flat_experts(model: StreamedModel) -> None:
    """CheckpointError where experts are stored in two dimensions: what a flat tensor is multiplied with part by part has
    no name, no input and no row in a report of its own. Left dense, it would be most of the model."""
    if model.parts:
        raise CheckpointError(
            f"{model.folder}: {model.parts[0]} holds several experts in two dimensions ({len(model.parts)} such tensors), "
            f"which cannot be told apart; {model.config.model_type} cannot be pruned"
        )


def refuse_stored(folder: Path, stored: Iterable[tuple[str, torch.dtype]]) -> None:
    """CheckpointError for weights, by on-disk name, in a dtype that holds a code rather than their value."""
    for key, dtype in stored:
        if dtype not in FLOATS:
            spelled = "8-bit floats" if dtype.is_floating_point else str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{folder}: {key} is stored in {spelled} ({dtype}); start from the checkpoint in 16 or 32 bits"
            )


def refuse_shared_blocks(model: StreamedModel) -> None:
    """CheckpointError where several blocks are one on disk: each would meet other inputs, and all but the first would run
    on what is pruned already."""
    for one, other in model.same_parameters():
        first, second = in_block(one, model.blocks_path), in_block(other, model.blocks_path)
        if first is not None and second is not None and first != second:
            raise CheckpointError(
                f"{model.folder}: blocks {min(first, second)} and {max(first, second)} share their weights "
                f"({one} is {other}); {model.config.model_type} cannot be pruned or packed"
            )
