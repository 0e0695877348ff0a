"""What block matching makes small: how far a block's output is from what it should be."""

# pyright: reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmsparse.models.streamed import StreamedModel

LOGITS_AT_ONCE = 2**23  # 32 MiB in fp32, of which up to HELD_LOGITS are held at once
HELD_LOGITS = 6


class Loss(Protocol):
    """Of the output (batch, tokens, width) that a block has for one batch; a mean over its tokens, in fp32."""

    of: str  # "output", relative, or "logits", in nats

    def __call__(self, output: Tensor, batch: int) -> Tensor: ...


class OutputError:
    """‖block(x) − target‖² / ‖target‖² of each token.

    By the token's own norm: the next block normalises every token, and a few tokens of huge norm would otherwise be all
    that is matched. `targets`: one (batch, tokens, width) a batch.
    """

    of = "output"

    def __init__(self, targets: Sequence[Tensor]) -> None:
        self.targets = targets

    def __call__(self, output: Tensor, batch: int) -> Tensor:
        target = self.targets[batch].to(output.device).float()  # (batch, tokens, width)
        error = (output.float() - target).square().sum(-1)  # (batch, tokens)
        return (error / target.square().sum(-1).clamp_min(1e-12)).mean()


class LogitDivergence:
    """KL(source ‖ made) of the next token, in nats, through the final norm and the head: what is behind the last block.

    Directions of the output that the head does not look at cost nothing, which no error of the output knows. Logits are made
    for some tokens at a time and once more for the gradient, so that a large vocabulary takes no more memory than a small
    one. `targets`: the source's hidden states after its last block.
    """

    of = "logits"

    def __init__(self, model: StreamedModel, targets: Sequence[Tensor]) -> None:
        self.model, self.targets = model, targets

    def __call__(self, output: Tensor, batch: int) -> Tensor:
        target = self.targets[batch].to(output.device)
        windows, tokens = output.shape[:2]
        at_once = max(1, LOGITS_AT_ONCE // (windows * self.model.vocabulary))
        total = output.new_zeros((), dtype=torch.float32)
        for start in range(0, tokens, at_once):
            part = slice(start, start + at_once)
            pair = output[:, part], target[:, part]
            total = total + cast(Tensor, checkpoint(self._divergence, *pair, use_reentrant=False))
        return total / (windows * tokens)

    def _divergence(self, output: Tensor, target: Tensor) -> Tensor:
        """Σ over tokens."""
        with torch.no_grad():
            wanted = self._likelihoods(target)
        made = self._likelihoods(output)
        return (wanted.exp() * (wanted - made)).sum()

    def _likelihoods(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden.to(self.model.dtype)).float().log_softmax(-1)  # (batch, some, vocabulary)
