"""How the next token of one request is chosen: what was asked, over what the model's generation_config says.

The rules are transformers' own, built as `generate` builds them, one list a request: so the same settings choose the
same token in both. A temperature too small to matter is the largest logit, the first of equals, and no draw at all.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import NumericalError

SMALLEST_TEMPERATURE = 1e-5  # less is greedy, as in vLLM; logits over 1e-38 would be infinite
ASKED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of a request, by generation_config's names
OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
NOT_SERVED: dict[str, Any] = {  # keys of a generation_config, and the values with which they ask for nothing
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "guidance_scale": (None, 1),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "encoder_repetition_penalty": (None, 1),
    "encoder_no_repeat_ngram_size": (None, 0),
    "token_healing": (None, False),
    "max_time": (None,),
}


@dataclass(frozen=True)
class Sampling:
    """What a request asks; None is what the model's generation_config says, or nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None


class Rules:
    """What the model's generation_config says of choosing, and the samplers that follow it."""

    def __init__(self, model: Any) -> None:
        self._model, self._own = model, model.generation_config
        ends = self._own.eos_token_id
        self.ends = frozenset[int]() if ends is None else frozenset(ends if isinstance(ends, list) else [ends])
        stops = self._own.stop_strings
        self.stops: tuple[str, ...] = () if stops is None else (stops,) if isinstance(stops, str) else tuple(stops)

    def not_served(self) -> list[str]:
        """What the generation_config asks and a server that answers token by token cannot do, as `key=value`."""
        own = {key: getattr(self._own, key, None) for key in NOT_SERVED}
        return [f"{key}={own[key]}" for key, nothing in NOT_SERVED.items() if own[key] not in nothing]

    def sampler(self, asked: Sampling, prompt_tokens: int, new: int, choice: int = 0) -> Sampler:
        """For one answer of at most `new` tokens; `choice` counts the answers to one prompt: each draws its own."""
        config = self._config(asked, prompt_tokens + new)
        device = self._model.device
        rules = self._model._get_logits_processor(config, input_ids_seq_length=prompt_tokens, device=device)
        if asked.presence_penalty or asked.frequency_penalty:
            rules.insert(0, _Counted(prompt_tokens, asked.presence_penalty, asked.frequency_penalty))
        if not config.do_sample:
            return Sampler(rules, None, greedy=True)
        if asked.seed is None:
            return Sampler(rules, None, greedy=False)
        generator = torch.Generator(device)
        generator.manual_seed(_mixed(asked.seed, choice))
        return Sampler(rules, generator, greedy=False)

    def _config(self, asked: Sampling, length: int) -> Any:
        config = copy.deepcopy(self._own)
        if not config.do_sample:  # then what it says of sampling is idle, and transformers' defaults are not asked for
            for key in OF_SAMPLING:
                setattr(config, key, None)
        for key in ASKED:
            if getattr(asked, key) is not None:
                setattr(config, key, getattr(asked, key))
        config.top_k = config.top_k or None
        config.do_sample = self._draws(asked, config)
        for key in NOT_SERVED:
            setattr(config, key, None)
        config.max_length = length
        self._model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=self._model.device)
        return config

    def _draws(self, asked: Sampling, config: Any) -> bool:
        if asked.temperature is None and not self._own.do_sample:
            return False
        warmth = 1.0 if config.temperature is None else config.temperature
        return warmth >= SMALLEST_TEMPERATURE and config.top_k != 1 and config.top_p != 0


class Sampler:
    """Chooses the tokens of one answer, one after the other."""

    def __init__(self, rules: Any, generator: torch.Generator | None, *, greedy: bool) -> None:
        self._rules, self._generator, self._greedy = rules, generator, greedy
        self.plain = greedy and not rules  # the largest logit, and nothing else

    def choose(self, logits: Tensor, ids: Tensor) -> int:
        """The token after `ids` (1, tokens), from its logits (1, vocabulary), float32. NumericalError for NaN."""
        scores = self._rules(ids, logits)
        if self._greedy:
            token = int(scores.argmax(-1))
            if bool(scores[0, token].isnan()):
                raise NumericalError(NO_NUMBERS)
            return token
        chances = torch.softmax(scores, -1)
        if not bool(chances.sum().isfinite()):  # asked before the draw, which would end a GPU's process
            raise NumericalError(NO_NUMBERS)
        return int(torch.multinomial(chances, 1, generator=self._generator))


NO_NUMBERS = "the model's logits are NaN: its weights hold NaN or Inf, or --dtype is too narrow for it"


class _Counted:
    """OpenAI's penalties: each token of the answer so far costs its logit `presence` once and `frequency` each time."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self._from, self._presence, self._frequency = prompt_tokens, presence, frequency

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(ids[0, self._from :], minlength=scores.shape[-1])
        return scores - self._frequency * counts - self._presence * (counts > 0)


def _mixed(seed: int, choice: int) -> int:
    """A seed for each answer to one prompt: splitmix64, folded, since a CPU's generator sees but 32 bits of it."""
    mixed = (seed + (choice + 1) * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> shift) * factor % 2**64
    return mixed ^ mixed >> 32
