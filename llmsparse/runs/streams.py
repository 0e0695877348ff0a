"""What flows through a model while it is made over: calibration windows, and held-out windows to measure the loss on.

Calibration windows through what has been made, held-out windows through the same and through the source, and where blocks
are matched calibration windows through the source. Each block's outputs take the place of its inputs, so every stream is
in memory once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmsparse.models.activations import Activations
from llmsparse.models.block import Block, Head
from llmsparse.models.likelihood import likelihood_of_batches, perplexity_of
from llmsparse.models.streamed import StreamedModel
from llmsparse.ranks.group import ALONE, Ranks


class Streams:
    """`calibration` and `held_out` are what enters the next block, behind the blocks made so far; `held_out` is None
    where there is no window to hold out.

    `batches` and `held_out`: (batch, tokens) ids; `held_out_of` names the text of each held-out batch, where there are
    several. Of several processes each holds its share of the windows. `made` is the model that results where it is another
    than the source with other weights: its blocks may be called with other arguments. `to_head`: calibration windows are wanted behind the
    last block, too. `aims`: so are those of the source behind each block, which `through_source` leaves in the field of that
    name: what the made block should come to.
    """

    def __init__(
        self,
        source: StreamedModel,
        batches: Sequence[Tensor],
        held_out: Sequence[Tensor],
        made: StreamedModel | None = None,
        *,
        held_out_of: Sequence[str] = (),
        to_head: bool = False,
        aims: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._source, self._made, self._windows = source, made or source, held_out
        self._ranks = ranks
        self._texts = list(held_out_of) or [""] * len(held_out)
        self.calibration = source.embed(batches, ranks)
        self.aims = self.calibration.like(list(self.calibration.hidden)) if aims else None
        self.held_out = source.embed(held_out, ranks) if held_out else None
        self._dense = self.held_out.like(list(self.held_out.hidden)) if self.held_out else None
        self._enter_made = [self._as_made(self.calibration, batches)]
        if self.held_out:
            self._enter_made.append(self._as_made(self.held_out, held_out))
        self._before: dict[str, float] | None = None
        self._last = None if to_head else self._made.block_names[-1]

    @property
    def flow(self) -> bool:
        """Some windows are taken through what is made."""
        return any(stream.hidden for stream in self._enter_made)

    @torch.no_grad()
    def through_source(self, block: Block) -> None:
        """Take the windows of the source through a block of it; to be done before the block is changed."""
        if isinstance(block, Head):
            self._measure_source()
            return
        for stream in filter(None, (self._dense, self.aims)):
            block.run(stream, into=stream)

    @torch.no_grad()
    def through_made(self, block: Block) -> None:
        """Take all windows through a block as it was made; of the last one only what is still wanted."""
        if isinstance(block, Head):
            return
        for stream in self._enter_made[block.name == self._last :]:
            block.run(stream, into=stream)

    def _measure_source(self) -> None:
        if self._dense and self._before is None:
            self._before = self._likelihoods(self._source, self._dense)

    def perplexity(self) -> dict[str, Any] | None:
        """{"before", "after", "windows", "seq_len", "tokens"} of the held-out windows; None where there are none.

        Of several texts that is of all together, and beside it the same of each, worst first, in a list "sources".
        """
        if not self.held_out:
            return None
        self._measure_source()
        assert self._before is not None
        before, after = self._before, self._likelihoods(self._made, self.held_out)
        found = self._described(sum(before.values()), sum(after.values()), self._windows)
        if len(before) == 1:
            return found
        sources = [
            {"source": text}
            | self._described(before[text], after[text], [self._windows[n] for n in self._batches(text)])
            for text in before
        ]
        return found | {"sources": sorted(sources, key=_loss, reverse=True)}

    def _likelihoods(self, model: StreamedModel, acts: Activations) -> dict[str, float]:
        """Σ −log p of the held-out windows of each text."""
        found = likelihood_of_batches(model, acts, self._windows)
        return {text: sum(found[n] for n in self._batches(text)) for text in dict.fromkeys(self._texts)}

    def _batches(self, text: str) -> list[int]:
        return [number for number, name in enumerate(self._texts) if name == text]

    @staticmethod
    def _described(before: float, after: float, windows: Sequence[Tensor]) -> dict[str, Any]:
        tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in windows)
        return {
            "before": perplexity_of(before, tokens),
            "after": perplexity_of(after, tokens),
            "windows": sum(ids.shape[0] for ids in windows),
            "seq_len": windows[0].shape[1],
            "tokens": tokens,
        }

    @property
    def calibration_as_made(self) -> Activations:
        """`calibration`, with the arguments that blocks of the made model are called with."""
        return self._enter_made[0]

    def _as_made(self, stream: Activations, windows: Sequence[Tensor]) -> Activations:
        """The same hidden states, held once, with the arguments that the made model's blocks are called with."""
        return stream if self._made is self._source else self._made.embed(windows, self._ranks).like(stream.hidden)


def _loss(perplexity: dict[str, Any]) -> float:
    """By what factor it rose; infinite where it is no number."""
    ratio = perplexity["after"] / perplexity["before"]
    return math.inf if math.isnan(ratio) else ratio
