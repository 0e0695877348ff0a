"""What the solver of a block is told, besides what to prune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmsparse.calibration.matching_loss import LogitDivergence, Loss, OutputError
from llmsparse.models.streamed import Activations, StreamedModel
from llmsparse.pruning.permutation.fold import Fold


@dataclass(frozen=True)
class PruneOptions:
    """Of a whole run."""

    device: torch.device
    dtype: torch.dtype  # to run blocks in
    seed: int
    match_steps: int
    fading: bool  # masks are made while a block is matched
    true_sequential: bool
    keep_zeros: bool
    calibration_tokens: int
    statistics_budget: int  # bytes of statistics that may be held at once
    model: StreamedModel
    folds: Mapping[str, Sequence[Fold]]  # block → matrices whose inputs may be reordered

    def loss_of(self, block: str, aims: Activations) -> Loss:
        """What matching makes small: behind the last block the distance of logits, elsewhere that of the output."""
        last = block == self.model.block_names[-1]
        return LogitDivergence(self.model, aims.hidden) if last else OutputError(aims.hidden)
