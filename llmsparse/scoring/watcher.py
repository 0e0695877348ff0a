"""The experts of one block, watched while calibration batches run through it: statistics of every text by itself."""

from __future__ import annotations

from collections.abc import Container, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmsparse.models.streamed import Block
from llmsparse.scoring.mixture import Call, Mixture, intercepted
from llmsparse.scoring.statistics import ExpertStatistics, of_both


@dataclass
class SumsOfTexts:
    """Of some batches, text by text."""

    of: dict[str, ExpertStatistics] = field(default_factory=dict[str, ExpertStatistics])

    def merge(self, other: SumsOfTexts) -> SumsOfTexts:
        """This, with later batches."""
        self.of = of_both(self.of, other.of)
        return self

    def cpu(self) -> dict[str, ExpertStatistics]:
        return {text: sums.cpu() for text, sums in self.of.items()}


class Watcher:
    """`texts` names, batch by batch, the text of every window. Statistics are summed up under these names, on the device
    that computes; `outputs` are (tokens, width) of every batch whose are `kept`: what the experts gave together."""

    def __init__(
        self, block: Block, mixture: Mixture, texts: Sequence[Sequence[str]], kept: Container[int] = ()
    ) -> None:
        self._block, self._mixture, self._texts, self._kept = block, mixture, texts, kept
        self._sums = SumsOfTexts()
        self.outputs: dict[int, Tensor] = {}

    def begin_sums(self) -> SumsOfTexts:
        """From here on other sums."""
        self._sums = SumsOfTexts()
        return self._sums

    @contextmanager
    def watching(self, batch: int) -> Generator[None]:
        """Open while batch number `batch` runs through the block."""

        def observe(call: Call) -> Tensor:
            seen = call.observe()
            windows, device = self._texts[batch], seen.index.device
            owner = torch.arange(len(windows), device=device).repeat_interleave(len(seen.index) // len(windows))
            for text in dict.fromkeys(windows):
                own = torch.tensor([window == text for window in windows], device=device)[owner]  # (tokens,)
                sums = self._sums.of.setdefault(text, ExpertStatistics.empty(self._mixture.experts, device))
                sums.add(seen.index[own], seen.gates[own], seen.norms[own])
            if batch in self._kept:
                self.outputs[batch] = seen.output
            return seen.returned

        with intercepted(self._block, self._mixture, observe):
            yield
