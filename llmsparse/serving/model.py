"""The model that is served: what requests depend on, and how one becomes answers on their way."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llmsparse.inference.detokenizer import Detokenizer
from llmsparse.inference.sampling import Rules
from llmsparse.serving.choice import Choice
from llmsparse.serving.engine import Engine
from llmsparse.serving.forward import Forward
from llmsparse.serving.prompt import Prompt, Prompts, room_for_answer
from llmsparse.serving.refusal import RefusedError
from llmsparse.serving.request import CHAT, MOST_CHOICES, Asked, read
from llmsparse.serving.sequence import News, Sequence
from llmsparse.serving.stop import Stop
from llmsparse.serving.template import ChatTemplate
from llmsparse.serving.tool_calls import Responses

NEW_TOKENS = 1024  # where a request does not say, if there is room for as many


@dataclass(frozen=True)
class Prepared:
    """A request that has been read and can be answered: answers to be, a Choice and a Sequence for each."""

    asked: Asked
    prompts: list[Prompt]
    choices: list[Choice]
    sequences: list[Sequence]
    echoes: list[str]  # what each choice's text begins with

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


class ServedModel:
    """A model with its tokenizer and its names."""

    def __init__(self, model: Any, tokenizer: Any, names: tuple[str, ...], forward: Forward, room: int) -> None:
        """`names`: the first is the one that is told; `room`: tokens of all conversations together."""
        config = model.config.get_text_config()
        self.name, self.names = names[0], frozenset(names)
        self.context = min(getattr(config, "max_position_embeddings", None) or sys.maxsize, room)
        self.rules = Rules(model)
        self.engine = Engine(forward, model.device, room)
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, self.name)
        rows = min(config.vocab_size, model.get_input_embeddings().weight.shape[0])
        self._prompts = Prompts(tokenizer, self._template, self.context, rows)
        self._responses = Responses(tokenizer, model)
        self._anchor: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    def prepare(self, path: str, body: Any, tell: Callable[[int, News], None]) -> Prepared:
        """Read a request; `tell` will get what becomes of each choice, by its index. Raises RefusedError."""
        asked = read(path, body, self.names, self.name)
        prompts = self._prompts.read(asked)
        if len(prompts) * asked.choices > MOST_CHOICES:
            raise RefusedError(400, f"{len(prompts)} prompts with n={asked.choices}: more than {MOST_CHOICES} answers")
        rooms = [room_for_answer(prompt, asked, self.context, NEW_TOKENS) for prompt in prompts]
        prepared = Prepared(asked, prompts, [], [], [])
        for prompt, new in zip(prompts, rooms, strict=True):
            echo = self._echo(prompt) if asked.echo else ""
            for number in range(asked.choices):
                index = len(prepared.choices)
                prepared.choices.append(self._choice(index, asked, prompt))
                prepared.sequences.append(self._sequence(index, asked, prompt, new, number, tell))
                prepared.echoes.append(echo)
        return prepared

    def _sequence(
        self, index: int, asked: Asked, prompt: Prompt, new: int, number: int, tell: Callable[[int, News], None]
    ) -> Sequence:
        return Sequence(
            prompt=prompt.ids,
            new=new,
            sampler=self.rules.sampler(asked.sampling, len(prompt.ids), new, number),
            ends=self.rules.ends,
            tell=lambda news: tell(index, news),
            alone=asked.sampling.seed is not None,
            logprobs=asked.logprobs,
            score_prompt=asked.echo and asked.logprobs is not None,
        )

    def _choice(self, index: int, asked: Asked, prompt: Prompt) -> Choice:
        parsed = asked.path == CHAT and self._responses.known
        return Choice(
            index,
            Detokenizer(self._tokenizer, prompt.ids, skip_special_tokens=not parsed),
            Stop((*asked.stop, *self.rules.stops)),
            self._responses.parts(prompt.text or "", asked.tools) if parsed else None,
            scored=asked.logprobs is not None,
        )

    def _echo(self, prompt: Prompt) -> str:
        return str(self._tokenizer.decode(list(prompt.ids))) if prompt.text is None else prompt.text

    def _token_text(self, token: int) -> str:
        """A token's own text, with the blank that it begins with; a tokenizer would drop that at the start."""
        before, both = (self._tokenizer.decode(ids) for ids in (self._anchor, [*self._anchor, token]))
        return both[len(before) :] if both.startswith(before) else self._tokenizer.decode([token])
