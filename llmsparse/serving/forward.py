"""One step of the model: a conversation by itself, or many together, a token of each.

By itself a conversation runs exactly as in `generate`. Together, the linear layers see all tokens at once, which is
where the time goes, and attention runs conversation by conversation over its own keys and values, through
transformers' interface for attention functions: no padding, and no conversation sees how long another one is.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from llmsparse.errors import CheckpointError
from llmsparse.inference.cache import bytes_held, new_cache, of_attention

CHUNK = 512  # tokens of a prompt that are read at once, so that others need not wait for all of it
PROBE = 8  # tokens of the two conversations that show whether this model can run many together
TOLERANCE = 0.05  # of the largest logit, between together and alone: rounding in bf16 is a fifth of that


class Forward:
    """A model's steps. Used by one thread, under torch.inference_mode."""

    def __init__(self, model: Any) -> None:
        takes = inspect.signature(model.forward).parameters
        if "past_key_values" not in takes:
            raise CheckpointError(
                f"{type(model).__name__} takes no past_key_values; serve cannot keep its conversations"
            )
        self._model, self._device = model, model.device
        self._config = model.config.get_text_config()
        self._keep = "logits_to_keep" in takes
        self._attend = _attention_of(model, self._config._attn_implementation)  # pyright: ignore[reportPrivateUsage]
        self._caches: Sequence[DynamicCache] = ()
        self._together = f"llmsparse_together_{id(self)}"  # the name of our attention function
        AttentionInterface.register(self._together, self._attend_together)
        probe = self.cache(PROBE)
        self.in_parts = of_attention(probe)
        self.read(probe, list(range(PROBE)))
        self.bytes_per_token = bytes_held(probe) // PROBE
        self.why_alone = self._why_alone()

    def cache(self, most: int) -> DynamicCache:
        """For a conversation of at most `most` tokens."""
        return new_cache(self._config, most)

    def read(self, cache: DynamicCache, tokens: Sequence[int], keep: int = 1) -> Tensor:
        """Logits (kept, vocabulary) after the last `keep` of `tokens`, which follow what the cache has seen; 0: all."""
        ids = torch.tensor([tokens], device=self._device)
        few = {"logits_to_keep": keep} if self._keep else {}
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **few).logits[0]
        return logits[-keep:]

    def step_together(self, caches: Sequence[DynamicCache], tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Logits (conversations, vocabulary) after one more token of each; `lengths` are those before it."""
        own = self._config._attn_implementation  # pyright: ignore[reportPrivateUsage]
        self._caches, self._config._attn_implementation = caches, self._together
        try:
            return self._model(
                input_ids=torch.tensor(tokens, device=self._device)[:, None],
                position_ids=torch.tensor(lengths, device=self._device)[:, None],
                use_cache=False,
            ).logits[:, -1]
        finally:
            self._caches, self._config._attn_implementation = (), own

    def _attend_together(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention of one token of each conversation, (conversations, heads, 1, width), over its own cache."""
        outputs = list[Tensor]()
        for number, cache in enumerate(self._caches):
            own = slice(number, number + 1)
            keys, values = cache.update(key[own], value[own], module.layer_idx)
            outputs.append(self._attend(module, query[own], keys, values, None, **options)[0])
        return torch.cat(outputs), None

    def _why_alone(self) -> str | None:
        """Why conversations of this model cannot run together: what it says together is not what it says alone."""
        if not self.in_parts:
            return "it keeps more than keys and values"
        if self._attend is None or not getattr(self._model, "_supports_attention_backend", False):
            return "its attention cannot be replaced"
        prompts = [[1, 2, 3], [4, 3, 2, 1, 0]]
        alone, caches = list[Tensor](), list[DynamicCache]()
        for prompt in prompts:
            alone.append(self.read(self.cache(PROBE), [*prompt, 5]))
            caches.append(self.cache(PROBE))
            self.read(caches[-1], prompt)
        try:
            together = self.step_together(caches, [5, 5], [len(prompt) for prompt in prompts])
        except Exception as error:  # whatever a model does with arguments that it does not expect
            return f"its forward fails there ({type(error).__name__})"
        wanted = torch.cat(alone)
        off = (together.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        return None if off < TOLERANCE else f"its logits would be off by {float(off):.0%}"


def _attention_of(model: Any, name: str) -> Any:
    """The attention function that the model runs, or None."""
    if name == "eager":
        return getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    return AttentionInterface().get(name)
