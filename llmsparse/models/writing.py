"""A model writes text: token by token from given beginnings, each token drawn from what the model makes of those before.

A model that fits into memory is held whole and keeps what it needs of earlier tokens (`write_whole`). One that does not is
run block by block, all windows together, once for every token, each time over all tokens so far (`write_streamed`): that
reads the model as often as a window has tokens, so these should be short.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.models.empty_model import quiet
from llmsparse.models.streamed import StreamedModel
from llmsparse.text.own_text import FREE

CACHES = ("past_key_values", "cache_params")  # what a model returns to be given back with the next token


@dataclass(frozen=True)
class Chooser:
    """Chooses the next tokens: those that `prefixes` (windows, some) prescribe, and others by chance.

    `first` follows `end` where both are given: the next text begins as every text does.
    """

    prefixes: Tensor
    temperature: float
    generator: torch.Generator
    first: int | None = None
    end: int | None = None

    def begin(self, length: int) -> Tensor:
        """(windows, length) ids, of which the first is known."""
        ids = torch.zeros(len(self.prefixes), length, dtype=torch.int64)
        ids[:, 0] = self.prefixes[:, 0]
        return ids

    def choose(self, logits: Tensor, ids: Tensor, place: int) -> None:
        """Fill the column `place` of `ids` by `logits` (windows, vocabulary) of the token before."""
        scores = logits.float().cpu() / self.temperature
        if not bool(scores.isfinite().any(dim=1).all()) or bool(scores.isnan().any()):
            raise NumericalError("self: the model's logits are NaN or Inf where it writes; try --dtype float32")
        drawn = torch.multinomial(scores.softmax(dim=1), 1, generator=self.generator)[:, 0]
        if self.first is not None and self.end is not None:
            drawn = torch.where(ids[:, place - 1] == self.end, self.first, drawn)
        if place < self.prefixes.shape[1]:
            given = self.prefixes[:, place]
            drawn = torch.where(given == FREE, drawn, given)
        ids[:, place] = drawn


@torch.no_grad()
def write_whole(
    model: StreamedModel, chooser: Chooser, length: int, advance: Callable[[], None] = lambda: None
) -> Tensor:
    """(windows, length) int64 ids, one for each row of the chooser's prefixes. `model` is held whole meanwhile."""
    ids, state = chooser.begin(length), dict[str, Any]()
    with quiet(), model.whole() as whole:
        device = whole.get_input_embeddings().weight.device
        for place in range(1, length):
            new = ids[:, place - 1 : place] if state or place == 1 else ids[:, :place]
            output = whole(new.to(device), use_cache=True, **state)
            state = {name: output[name] for name in CACHES if output.get(name) is not None}
            chooser.choose(output.logits[:, -1], ids, place)
            advance()
    return ids


@torch.no_grad()
def write_streamed(
    model: StreamedModel, chooser: Chooser, length: int, at_once: int, advance: Callable[[], None] = lambda: None
) -> Tensor:
    """The same block by block, `at_once` windows in a batch: the whole model is read for every token."""
    ids = chooser.begin(length)
    for place in range(1, length):
        acts = model.embed(list(ids[:, :place].split(at_once)))
        for block in model.blocks():
            block.run(acts, into=acts)
        last = [model.logits(hidden[:, -1:])[:, -1].cpu() for hidden in acts.hidden]
        chooser.choose(torch.cat(last), ids, place)
        advance()
    return ids
