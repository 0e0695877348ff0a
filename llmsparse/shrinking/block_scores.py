"""Which blocks a model can do without.

`influence` asks how far a block turns the hidden states: 1 − cos(input, output), the mean over tokens (ShortGPT, arXiv
2403.03853); the blocks with the least go at once. `suffix` asks what the rest of the model makes of it: the divergence
KL(p ‖ q) of the output without the block, q, from that of the whole model, p; the block with the least goes, and all that are
left are asked again.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.models.likelihood import LOGIT_ELEMENTS
from llmsparse.models.streamed import Activations, StreamedModel
from llmsparse.ranks.group import ALONE, Ranks
from llmsparse.ranks.tree import LEAVES

SUFFIX_TOKENS = 2**13  # of calibration that divergences are measured on
NOTHING = -1  # a candidate that skips no block
STREAM_BYTES = 2**31  # of hidden states without one block each, held at once

Advance = Callable[[], None]


@dataclass(frozen=True)
class Removal:
    """A block that goes, and the score that it had when it was chosen."""

    index: int
    score: float


def by_influence(
    model: StreamedModel, batches: Sequence[Tensor], count: int, advance: Advance, ranks: Ranks = ALONE
) -> list[Removal]:
    """The `count` blocks of the least influence on these batches of (batch, tokens) ids, least first."""
    scores: list[float] = []
    acts = model.embed(batches, ranks)
    for block in ranks.each(model.blocks()):
        angles: dict[int, float] = {}
        for place, (batch, hidden) in enumerate(zip(acts.share.numbers, acts.hidden, strict=True)):
            with torch.no_grad():
                output = block.call(acts, place).to(hidden.device)
            angles[batch] = F.cosine_similarity(hidden.float(), output.float(), dim=-1).double().sum().item()
            acts.hidden[place] = output
        scores.append(1 - sum(acts.share.collected(angles).values()) / acts.share.tokens)
        advance()
    with ranks.together():
        removed = [Removal(index, _finite(score, index)) for index, score in enumerate(scores)]
    return sorted(removed, key=lambda one: one.score)[:count]


def by_suffix(
    model: StreamedModel, batches: Sequence[Tensor], count: int, advance: Advance, ranks: Ranks = ALONE
) -> list[Removal]:
    """`count` blocks, each the one without which the output stays closest to the whole model's once those before it are gone.

    `advance` is called for every candidate.
    """
    start = model.embed(measured(batches), ranks)
    whole = without(model, start, [], [NOTHING])[NOTHING]
    held = max(ranks.gather(sum(hidden.nbytes for hidden in start.hidden)))
    removed: list[Removal] = []
    for _ in range(count):
        gone = [one.index for one in removed]
        left = [index for index in range(len(model.block_names)) if index not in gone]
        scores: dict[int, float] = {}
        for group in _groups(left, max(1, STREAM_BYTES // held)):
            ends = without(model, start, gone, group)
            found = divergences(model, whole, ends)
            with ranks.together():
                scores |= {index: _finite(score, index) for index, score in found.items()}
            for _ in group:
                advance()
        best = min(scores, key=lambda index: scores[index])
        removed.append(Removal(best, scores[best] / start.share.tokens))
    return removed


SCORES: dict[str, Callable[[StreamedModel, Sequence[Tensor], int, Advance, Ranks], list[Removal]]] = {
    "suffix": by_suffix,
    "influence": by_influence,
}


@torch.no_grad()
def without(
    model: StreamedModel, start: Activations, gone: Sequence[int], candidates: Sequence[int]
) -> dict[int, Activations]:
    """What leaves the last block when those in `gone` are skipped, and one candidate besides. NOTHING is a candidate, too.

    One pass: each block is loaded once, and run for all candidates before it.
    """
    common = start.like(list(start.hidden))  # skips what is gone, and no candidate yet
    skipping: dict[int, Activations] = {}
    names = {name for index, name in enumerate(model.block_names) if index not in gone}
    for block in start.share.ranks.each(model.blocks(names)):
        for stream in skipping.values():
            block.run(stream, into=stream)
        if block.index in candidates:
            skipping[block.index] = common.like(list(common.hidden))
        if NOTHING in candidates or block.index < max(candidates):
            block.run(common, into=common)
    return skipping | ({NOTHING: common} if NOTHING in candidates else {})


@torch.no_grad()
def divergences(model: StreamedModel, whole: Activations, others: dict[int, Activations]) -> dict[int, float]:
    """Σ over tokens of KL(p ‖ q) in nats, p the output of `whole`, q that of each other, of hidden states after the last
    block."""
    found: dict[int, dict[int, float]] = {}  # batch → other → Σ
    for batch, place in zip(whole.share.numbers, range(len(whole.hidden)), strict=True):
        hidden, sums = whole.hidden[place], dict.fromkeys(others, 0.0)  # (batch, tokens, width)
        tokens = max(1, LOGIT_ELEMENTS // (2 * hidden.shape[0] * model.vocabulary))
        for start in range(0, hidden.shape[1], tokens):
            part = slice(start, start + tokens)
            p = model.logits(hidden[:, part]).float().log_softmax(-1)  # (batch, tokens, vocabulary)
            for index, other in others.items():
                q = model.logits(other.hidden[place][:, part]).float().log_softmax(-1)
                sums[index] += F.kl_div(q, p, reduction="sum", log_target=True).item()
        found[batch] = sums
    of_batches = whole.share.collected(found).values()
    return {index: sum(sums[index] for sums in of_batches) for index in others}


def measured(batches: Sequence[Tensor]) -> list[Tensor]:
    """The first batches, until they hold SUFFIX_TOKENS."""
    windows = [windows for windows, _ in shapes_measured([(ids.shape[0], ids.shape[1]) for ids in batches])]
    first = torch.cat([ids[: sum(windows)] for ids in batches])[: sum(windows)]
    return [*torch.split(first, windows)]


def shapes_measured(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of those: (windows, tokens) each. Where they are too few for each of so many processes as can work to have one they are
    made smaller."""
    found: list[tuple[int, int]] = []
    for windows, tokens in shapes:
        if sum(count * length for count, length in found) >= SUFFIX_TOKENS:
            break
        found.append((windows, tokens))
    count, length = sum(windows for windows, _ in found), found[0][1]
    size = -(-count // LEAVES)
    if len(found) >= LEAVES or size >= found[0][0]:
        return found
    return [(min(size, count - start), length) for start in range(0, count, size)]


def _groups(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _finite(score: float, index: int) -> float:
    if score != score or score in (float("inf"), -float("inf")):
        raise NumericalError(f"the score of block {index} is {score}; try --dtype float32, or check the model")
    return score
