"""Windows that the model writes itself (`self`): how they begin, and what stands for them until they are written.

A window begins with the token that begins a text, and every second one with a few random tokens behind it, which leads
it where the model rarely goes by itself. Writing takes weights, which a plan has none of: until then the windows are
tensors on meta, of the shape that they will have, which nothing can be computed with by mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse.errors import CalibrationError
from llmsparse.text.bos import special_tokens
from llmsparse.text.kinds import SELF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmsparse.text.windows import Windows

TEMPERATURE = 1.0  # the model's own distribution
MOST_RANDOM = 3  # random tokens that a window may begin with
FREE = -1  # in a prefix: the model chooses


@dataclass(frozen=True)
class Starts:
    """How a text of a model may begin: `first` is the token that begins every one, `others` (n,) its ordinary tokens.

    `end` is the token that ends a text, where `first` must follow it; None where the model begins the next one itself.
    """

    first: int | None
    others: Tensor
    end: int | None
    name: str  # of the first token

    @classmethod
    def find(cls, tokenizer: PreTrainedTokenizerBase | None, config: Any, vocabulary: int, where: str) -> Starts:
        """Those of a model. CalibrationError where neither tokenizer nor config knows any token to begin with."""
        before = (special_tokens(tokenizer) or ([], []))[0] if tokenizer is not None else []
        known = [*before, getattr(tokenizer, "bos_token_id", None), getattr(config, "bos_token_id", None)]
        first = next((int(token) for token in known if isinstance(token, int) and 0 <= token < vocabulary), None)
        others = _ordinary(tokenizer, vocabulary)
        if first is None and not len(others):
            raise CalibrationError(
                f"self: {where} has no way to start a text: neither a bos_token_id in config.json nor a tokenizer; "
                "use --calibration FILE"
            )
        end = getattr(tokenizer, "eos_token_id", None)
        end = int(end) if isinstance(end, int) and first is not None and end != first else None
        name = "no token" if first is None else f"token {first}"
        if first is not None and tokenizer is not None:
            name = str(tokenizer.convert_ids_to_tokens(first))
        return cls(first, others, end, name)

    def prefixes(self, windows: int, seed: int) -> Tensor:
        """(windows, 1 + MOST_RANDOM) int64: what each begins with, FREE where the model chooses."""
        generator = torch.Generator().manual_seed(seed)
        prefixes = torch.full((windows, 1 + MOST_RANDOM), FREE)
        if len(self.others):
            numbers = torch.randint(len(self.others), prefixes.shape, generator=generator)
            lengths = torch.randint(1, 1 + MOST_RANDOM, (windows, 1), generator=generator)
            if self.first is not None:
                lengths[::2] = 0  # these begin with the first token alone
            place = torch.arange(1 + MOST_RANDOM) - int(self.first is not None)
            prefixes = torch.where(place < lengths, self.others[numbers], FREE)
        if self.first is not None:
            prefixes[:, 0] = self.first
        return prefixes

    @property
    def protocol(self) -> dict[str, Any]:
        """What a report says of windows that began so."""
        random = f"up to {MOST_RANDOM} random tokens" if len(self.others) else ""
        if self.first is None:
            return {"starts": random}
        return {"starts": self.name + (f", every second one with {random} behind it" if random else "")}


@dataclass(frozen=True)
class Unwritten:
    """What is to be written: `windows` of `length` tokens, the first `calibration` of them to calibrate on.

    `complete` makes all windows of a run of those that the model has written.
    """

    starts: Starts
    windows: int
    calibration: int
    length: int
    seed: int
    protocol: dict[str, Any]
    complete: Callable[[Windows], Windows]


def _ordinary(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> Tensor:
    """Ids of the tokens that stand in a text, (n,)."""
    if tokenizer is None:
        return torch.empty(0, dtype=torch.int64)
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return torch.tensor([token for token in range(min(len(tokenizer), vocabulary)) if token not in special])


def own_protocol(starts: Starts, seed: int) -> dict[str, Any]:
    return {"text": "written by the model itself", "temperature": TEMPERATURE} | starts.protocol | {"seed": seed}


__all__ = ["FREE", "SELF", "TEMPERATURE", "Starts", "Unwritten", "own_protocol"]
