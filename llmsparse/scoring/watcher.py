"""The experts of one block, watched while calibration batches run through it: statistics of every text by itself."""

from __future__ import annotations

from collections.abc import Container, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llmsparse.models.streamed import Block
from llmsparse.scoring.mixture import Call, Mixture, intercepted
from llmsparse.scoring.statistics import ExpertStatistics


class Watcher:
    """`texts` names, batch by batch, the text of every window. `statistics` are summed up under these names, on the device
    that computes; `outputs` are (tokens, width) of every batch whose are `kept`: what the experts gave together."""

    def __init__(
        self, block: Block, mixture: Mixture, texts: Sequence[Sequence[str]], kept: Container[int] = ()
    ) -> None:
        self._block, self._mixture, self._texts, self._kept = block, mixture, texts, kept
        self.statistics: dict[str, ExpertStatistics] = {}
        self.outputs: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, batch: int) -> Generator[None]:
        """Open while batch number `batch` runs through the block."""

        def observe(call: Call) -> Tensor:
            seen = call.observe()
            windows, device = self._texts[batch], seen.index.device
            owner = torch.arange(len(windows), device=device).repeat_interleave(len(seen.index) // len(windows))
            for text in dict.fromkeys(windows):
                own = torch.tensor([window == text for window in windows], device=device)[owner]  # (tokens,)
                sums = self.statistics.setdefault(text, ExpertStatistics.empty(self._mixture.experts, device))
                sums.add(seen.index[own], seen.gates[own], seen.norms[own])
            if batch in self._kept:
                self.outputs[batch] = seen.output
            return seen.returned

        with intercepted(self._block, self._mixture, observe):
            yield
