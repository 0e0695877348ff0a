"""Attention of the tokens that are being decoded, in a packed model on the CPU: by a C kernel in the place of torch's.

transformers asks its table of attention functions for the implementation that a model was loaded with. The entry `sdpa` is
replaced by one that hands on to the original whatever is not a marked module, or not a few tokens over keys and values on the CPU.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse.backends.cpu.attention import MASKS, attention, usable
from llmsparse.inference.gradient import wants_gradient
from llmsparse.inference.lean import LeanLayer

SDPA = "sdpa"
MARK = "decodes_by_llmsparse"
MOST = 8  # tokens
NOT_KNOWN = ("position_bias", "cache", "softcap")  # what sdpa does beside attention


def mark_attention(model: Any) -> None:
    """Let the attention of a model run by the kernel, if torch's `sdpa` is what runs it."""
    if getattr(model.config.get_text_config(), "_attn_implementation", None) != SDPA:
        return
    for module in attention_modules(model):
        vars(module)[MARK] = True
    from transformers import AttentionInterface  # not at the top: it needs the quantizers, of which this is a part

    stock = AttentionInterface()[SDPA]
    if stock is not _attend:
        _STOCK[SDPA] = stock
        AttentionInterface.register(SDPA, _attend)


def unmark_attention(model: nn.Module) -> None:
    """Let it run as before."""
    for module in model.modules():
        vars(module).pop(MARK, None)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """What calls an attention function."""
    return [module for module in model.modules() if hasattr(module, "is_causal")]


def lean_attention(model: Any) -> Iterator[LeanLayer]:
    """What runs by the kernel, if its heads are such that it is of use."""
    for name, module in model.named_modules():
        if MARK in vars(module) and usable(model.dtype, getattr(module, "head_dim", 0)):
            yield LeanLayer(name, "cpu-attention", MOST, "keys and values are read once for all heads that share them")


_STOCK: dict[str, Any] = {}


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """query (batch, heads, queries, width), key and value (batch, key heads, keys, width) → (batch, queries, heads, width)."""
    if MARK in vars(module) and not torch.compiler.is_compiling() and _fits(query, key, value, attention_mask, options):
        scaling = options.get("scaling")
        return attention(
            query, key, value, attention_mask, query.shape[3] ** -0.5 if scaling is None else scaling
        ), None
    return _STOCK[SDPA](module, query, key, value, attention_mask, **options)


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    queries, width = query.shape[2:]
    if not (query.is_cpu and key.is_cpu) or queries > MOST or (queries > 1 and mask is None):
        return False
    if not usable(query.dtype, width) or not query.dtype == key.dtype == value.dtype or not key.shape[2]:
        return False
    if options.get("dropout") or any(options.get(name) is not None for name in NOT_KNOWN):
        return False
    if mask is not None and (mask.dtype not in MASKS or mask.shape[-1] != key.shape[2]):
        return False
    return not wants_gradient(query, key, value) and not torch.is_autocast_enabled("cpu")
