"""Continuous batching: answers join and leave a running batch between two steps of the model.

One thread owns the model. A step reads a part of the prompts that have come, then gives every running answer a token,
together where the model can. Room for keys and values is set aside when an answer begins, so that what has begun can
end; what finds no room waits, first come, first served, and there is an end to the queue. What goes wrong for an answer
ends that answer: a step that fails for many is done again for each by itself.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.errors import NumericalError, one_line
from llmsparse.inference.sampling import NO_NUMBERS
from llmsparse.serving.forward import CHUNK, Forward
from llmsparse.serving.logprobs import score, score_prompt
from llmsparse.serving.sequence import Ended, News, Scored, Sequence

MOST_RUNNING = 64  # answers in one batch
MOST_WAITING = 1024  # answers in the queue
STOPPING = "the server is stopping"


class QueueFullError(Exception):
    """More answers wait than the queue has places."""


@dataclass(frozen=True)
class State:
    """How the engine is."""

    running: int
    waiting: int
    reserved: int  # tokens that room is set aside for
    room: int
    dead: str | None  # why nothing can be answered any more


class Engine:
    """`submit` answers, `cancel` them; they `tell` what becomes of them."""

    def __init__(self, forward: Forward, device: torch.device, room: int) -> None:
        """`room`: tokens of all conversations together."""
        self._forward, self._device, self._room = forward, device, room
        self._waiting = deque[Sequence]()
        self._running = list[Sequence]()
        self._reserved = 0
        self._dead: str | None = None
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="generation")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let every answer end after the step that it is at."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, sequences: List[Sequence]) -> None:
        """Queue all of them. QueueFullError where there is no place for all."""
        with self._changed:
            if len(self._waiting) + len(sequences) > MOST_WAITING:
                raise QueueFullError
            if not self._stopping:
                self._waiting += sequences
                self._changed.notify()
                return
        for sequence in sequences:
            sequence.tell(News(ended=Ended.STOPPING, reason=STOPPING))

    def cancel(self, sequences: List[Sequence]) -> None:
        """Nobody wants these any more; they tell nothing."""
        with self._changed:
            for sequence in sequences:
                sequence.cancelled = True
                if sequence in self._waiting:
                    self._waiting.remove(sequence)
            self._changed.notify()

    def state(self) -> State:
        return State(len(self._running), len(self._waiting), self._reserved, self._room, self._dead)

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with torch.inference_mode():
            while self._wait():
                try:
                    self._step()
                except Exception as error:  # none that is foreseen: those are of one answer
                    print(f"generation: {one_line(error)}", file=sys.stderr)
                    for sequence in list(self._running):
                        self._fail(sequence, error)
        for sequence in [*self._running, *self._waiting]:
            sequence.tell(News(ended=Ended.STOPPING, reason=STOPPING))

    def _wait(self) -> bool:
        """Until there is something to do; False to end."""
        with self._changed:
            while not (self._stopping or self._waiting or self._running):
                self._changed.wait()
            return not self._stopping

    def _step(self) -> None:
        for sequence in [sequence for sequence in self._running if sequence.cancelled]:
            self._leave(sequence)
        self._admit()
        ready = [sequence for sequence in self._running if not sequence.reading]
        left = CHUNK
        for sequence in [sequence for sequence in self._running if sequence.reading]:
            if left > 0:
                left -= self._read(sequence)
        together = [] if self._forward.why_alone else [sequence for sequence in ready if not sequence.alone]
        if len(together) > 1:
            self._step_together(together)
        for sequence in ready:
            if len(together) < 2 or sequence not in together:
                self._read(sequence)

    def _admit(self) -> None:
        with self._changed:
            while self._waiting and len(self._running) < MOST_RUNNING:
                if self._reserved + self._waiting[0].most > self._room:
                    return
                sequence = self._waiting.popleft()
                self._running.append(sequence)
                self._reserved += sequence.most
                sequence.begin(self._forward.cache(sequence.most), self._device)

    def _leave(self, sequence: Sequence) -> None:
        with self._changed:
            self._running.remove(sequence)
            self._reserved -= sequence.most
        sequence.cache = None

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._tell(sequence, News(ended=Ended.FAILED, reason=one_line(error)))
        if self._device.type == "cuda" and self._dead is None:
            try:
                torch.zeros(1, device=self._device).item()
            except RuntimeError as fatal:  # an error of the device stays with the process
                self._dead = f"generation has died: {one_line(fatal)}; start the server again"

    def _read(self, sequence: Sequence) -> int:
        """Run a sequence by itself over what it has not read, a part at a time; the tokens read."""
        tokens = sequence.unread()
        if self._forward.in_parts:
            tokens = tokens[:CHUNK]  # the same parts whoever else runs: they decide the rounding
        scoring = sequence.score_prompt and sequence.read < len(sequence.prompt)
        try:
            logits = self._forward.read(sequence.cache, tokens, keep=0 if scoring else 1)
            if scoring:
                sequence.scores += score_prompt(sequence, logits)
        except Exception as error:
            self._fail(sequence, error)
            return len(tokens)
        sequence.read += len(tokens)
        if sequence.read == sequence.length:
            self._choose([sequence], logits[-1:])
        return len(tokens)

    def _step_together(self, sequences: List[Sequence]) -> None:
        """A token for each; where that fails, each starts over by itself, and the one to blame fails there."""
        try:
            logits = self._forward.step_together(
                [sequence.cache for sequence in sequences],
                [sequence.last for sequence in sequences],
                [sequence.read for sequence in sequences],
            )
        except Exception:
            for sequence in sequences:
                sequence.alone = True
                sequence.begin(self._forward.cache(sequence.most), self._device)
            return
        for sequence in sequences:
            sequence.read += 1
        self._choose(sequences, logits)

    def _choose(self, sequences: List[Sequence], logits: Tensor) -> None:
        """The next token of each from its logits (sequences, vocabulary)."""
        logits = logits.float()
        largest = logits.argmax(-1)  # of equal ones the first
        plain = [NO_NUMBERS if nan else token for token, nan in zip(*_lists(logits, largest), strict=True)]
        for number, sequence in enumerate(sequences):
            if sequence.new == 0:
                self._tell(sequence, News(tuple(sequence.scores), ended=Ended.LENGTH))
                continue
            row, likeliest = logits[number : number + 1], plain[number]
            try:
                if not sequence.sampler.plain:
                    likeliest = sequence.sampler.choose(row.clone(), sequence.ids[:, : sequence.length])
                if isinstance(likeliest, str):
                    raise NumericalError(likeliest)
            except Exception as error:
                self._fail(sequence, error)
                continue
            scored = Scored(likeliest) if sequence.logprobs is None else score(row, [likeliest], sequence.logprobs)[0]
            self._tell(sequence, News(sequence.take_scores(), scored, sequence.add(likeliest)))

    def _tell(self, sequence: Sequence, news: News) -> None:
        if news.ended:
            self._leave(sequence)
        if not sequence.cancelled:
            sequence.tell(news)


def _lists(logits: Tensor, chosen: Tensor) -> tuple[list[int], list[bool]]:
    return chosen.tolist(), logits.gather(1, chosen[:, None])[:, 0].isnan().tolist()
