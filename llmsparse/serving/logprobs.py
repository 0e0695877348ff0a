"""Log-probabilities of tokens, as the model gives them: before temperature, penalties and all else that chooses."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence as List

import torch
from torch import Tensor

from llmsparse.serving.sequence import Scored, Sequence

ROWS = 64  # logits that are made probabilities at once


def score(logits: Tensor, tokens: List[int], likeliest: int) -> list[Scored]:
    """Each token in its row of `logits` (tokens, vocabulary), with the `likeliest` so many in its place."""
    scored = list[Scored]()
    for first in range(0, len(tokens), ROWS):
        chances = torch.log_softmax(logits[first : first + ROWS].float(), -1)
        own = torch.tensor(tokens[first : first + ROWS], device=logits.device)
        best = chances.topk(min(likeliest, chances.shape[-1]), -1)
        for token, logprob, others, chances_of in zip(
            own.tolist(),
            chances.gather(1, own[:, None])[:, 0].tolist(),
            best.indices.tolist(),
            best.values.tolist(),
            strict=True,
        ):
            scored.append(Scored(token, logprob, tuple(zip(others, chances_of, strict=True))))
    return scored


def score_prompt(sequence: Sequence, logits: Tensor) -> list[Scored]:
    """The tokens of a prompt that its next part decides, from that part's logits (part, vocabulary): a row is of the
    token after it. The first token of all has no log-probability."""
    start = sequence.read + 1
    tokens = sequence.prompt[start : start + len(logits)]
    first = [] if sequence.read else [Scored(sequence.prompt[0])]
    return first + score(logits[: len(tokens)], tokens, sequence.logprobs or 0)
