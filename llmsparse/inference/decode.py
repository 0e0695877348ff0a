"""One answer, token by token: `generate` of transformers without what it does beside the model's own forward.

The same tokens, bit for bit: the logits are the model's own, and the rules of choosing are built as `generate` builds them. What is
spared is what takes time between two forwards, and that keys and values are written anew for every token.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin

from llmsparse.errors import NumericalError
from llmsparse.inference.cache import new_cache, of_attention
from llmsparse.inference.sampling import NO_NUMBERS, Rules, Sampling

GREEDY = Sampling(temperature=0)


def why_not(model: Any) -> str | None:
    """Why a model's answers must be left to transformers' `generate`, in a few words; None if they need not."""
    own, usual = type(model), cast(Any, GenerationMixin)
    if own.generate is not usual.generate:
        return "it has a way of generating of its own"
    if own.prepare_inputs_for_generation is not usual.prepare_inputs_for_generation:
        return "it prepares its inputs in a way of its own"
    takes = inspect.signature(model.forward).parameters
    if "past_key_values" not in takes or "logits_to_keep" not in takes:
        return "its forward takes no past_key_values or no logits_to_keep"
    if not of_attention(new_cache(model.config.get_text_config(), 1)):
        return "it keeps more than keys and values"
    rules = Rules(model)
    asked = [*rules.not_served(), *(["stop_strings"] if rules.stops else [])]
    return f"its generation_config asks for {', '.join(asked)}" if asked else None


def refuse_nan(ids: Tensor, logits: Tensor) -> Tensor:
    """NumericalError where logits (batch, vocabulary) hold NaN, of which the largest would be taken all the same."""
    if bool(logits.isnan().any()):
        raise NumericalError(NO_NUMBERS)
    return logits


@torch.no_grad()
def decode(model: Any, ids: Tensor, new: int) -> Iterator[int]:
    """At most `new` tokens after `ids` (1, tokens), greedily, up to one that ends an answer, which comes too.

    NumericalError for logits that are NaN.
    """
    rules = Rules(model)
    sampler = rules.sampler(GREEDY, ids.shape[1], new)
    cache = new_cache(model.config.get_text_config(), ids.shape[1] + new)
    unread, said = ids, ids
    for _ in range(new):
        logits = model(input_ids=unread, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if sampler.plain:
            unread = logits.float().argmax(
                -1, keepdim=True
            )  # of equal ones the first; in bf16 torch takes five times as long
            token = int(unread)
            if bool(logits[0, token].isnan()):
                raise NumericalError(NO_NUMBERS)
        else:
            token = sampler.choose(logits.float(), said)
            unread = torch.tensor([[token]], device=ids.device)
            said = torch.cat((said, unread), dim=1)
        yield token
        if token in rules.ends:
            return
