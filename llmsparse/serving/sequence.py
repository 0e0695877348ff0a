"""One answer on its way: what it was asked, how far it is, and what it tells whoever asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor

from llmsparse.inference.sampling import Sampler


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, and those of the likeliest in its place, best first."""

    token: int
    logprob: float | None = None  # None where nobody asked, and for the first token of a prompt
    likeliest: tuple[tuple[int, float], ...] = ()


class Ended(Enum):
    """Why an answer ends."""

    STOP = "stop"  # the model said an end token
    LENGTH = "length"
    FAILED = "failed"
    STOPPING = "stopping"  # the server is


@dataclass(frozen=True)
class News:
    """What a step brings an answer: prompt tokens with scores, a new token, its end."""

    scored_prompt: tuple[Scored, ...] = ()
    token: Scored | None = None
    ended: Ended | None = None
    reason: str = ""  # of FAILED and STOPPING


@dataclass(eq=False)
class Sequence:
    """An answer to one prompt."""

    prompt: tuple[int, ...]
    new: int  # tokens at most
    sampler: Sampler
    ends: frozenset[int]
    tell: Callable[[News], None]  # called by the engine's thread
    alone: bool = False  # steps by itself, so that nobody else's tokens change its rounding
    logprobs: int | None = None  # how many likeliest tokens to tell with each; 0 is the token's own alone
    score_prompt: bool = False  # tell the prompt's log-probabilities
    cancelled: bool = False
    cache: Any = None
    read: int = 0  # tokens that the cache has seen
    length: int = field(init=False)  # tokens there are
    ids: Tensor = field(init=False)  # (1, prompt + new); the first `length` are filled in
    last: int = -1  # the token chosen last
    scores: list[Scored] = field(default_factory=list[Scored])  # of the prompt, as far as it has been read

    def __post_init__(self) -> None:
        self.length = len(self.prompt)

    @property
    def most(self) -> int:
        """Tokens that room is kept for."""
        return len(self.prompt) + self.new

    def begin(self, cache: Any, device: torch.device) -> None:
        """Take what it needs of the machine."""
        self.cache, self.read = cache, 0
        self.scores.clear()
        if self.length == len(self.prompt):
            self.ids = torch.empty((1, self.most), dtype=torch.long, device=device)
            self.ids[0, : self.length] = torch.tensor(self.prompt, device=device)

    def add(self, token: int) -> Ended | None:
        """Append what was chosen; why that is the last, if it is."""
        self.last = self.ids[0, self.length] = token
        self.length += 1
        if token in self.ends:
            return Ended.STOP
        return Ended.LENGTH if self.length == self.most else None

    @property
    def reading(self) -> bool:
        """Whether it still reads its prompt, or again what it had read."""
        return self.read < len(self.prompt) or self.length - self.read > 1

    def take_scores(self) -> tuple[Scored, ...]:
        """The prompt's, once."""
        scores, self.score_prompt = tuple(self.scores), False
        self.scores.clear()
        return scores

    def unread(self) -> list[int]:
        """Tokens that the cache has not seen."""
        return cast(list[int], self.ids[0, self.read : self.length].tolist())
