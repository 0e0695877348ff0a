"""How likely a streamed model finds a text, from the hidden states after its last block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmsparse.models.activations import Activations
from llmsparse.models.streamed import StreamedModel

LOGIT_ELEMENTS = 2**25  # logits computed at once: 128 MiB in fp32


def perplexity_of(nll: float, tokens: int) -> float:
    """exp(nll / tokens), cut off at e^700 (1e304), below where a float overflows; NaN stays NaN."""
    mean = nll / tokens
    return math.exp(700.0 if mean > 700.0 else mean)


def negative_log_likelihood(model: StreamedModel, acts: Activations, batches: Sequence[Tensor]) -> float:
    """Σ −log p(token | window so far) over all windows, in nats, from the hidden states after the last block.

    `batches`: the (batch, tokens) ids that `acts` was embedded from, of all processes.
    """
    return sum(likelihood_of_batches(model, acts, batches))


@torch.no_grad()
def likelihood_of_batches(model: StreamedModel, acts: Activations, batches: Sequence[Tensor]) -> list[float]:
    """The same of every batch, those of other processes too. Logits are made for a few tokens at a time."""
    found: dict[int, float] = {}
    for number, hidden in zip(acts.share.numbers, acts.hidden, strict=True):  # (batch, tokens, width)
        ids, total = batches[number], 0.0  # (batch, tokens)
        chunk = max(1, LOGIT_ELEMENTS // (ids.shape[0] * model.vocabulary))
        for start in range(0, ids.shape[1] - 1, chunk):
            stop = min(start + chunk, ids.shape[1] - 1)
            logits = model.logits(hidden[:, start:stop]).float()  # (batch, chunk, vocabulary)
            wanted = ids[:, start + 1 : stop + 1].to(logits.device)
            total += F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
        found[number] = total
    return list(acts.share.collected(found).values())
