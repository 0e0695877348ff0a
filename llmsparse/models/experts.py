"""Mixtures of transformers' interface of experts, run expert by expert: what multiplies is up to the caller.

A module of it holds the matrices of all of its experts as parameters of three dimensions, and says how they lie: `is_transposed`,
`has_gate`, `has_bias`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Product = Callable[[str, Tensor], Tensor]  # of an expert: the name of a parameter, x (tokens, in) → (tokens, out)


def runs_by_expert(module: Any) -> bool:
    """Whether a module is of the interface."""
    return hasattr(module, "is_transposed")


def matrix_of_expert(module: Any, leaf: str, expert: int) -> Tensor:
    """(out, in), a view of a parameter."""
    weight = getattr(module, leaf)[expert]
    return weight.T if module.is_transposed else weight


def bias_of_expert(module: Any, leaf: str, expert: int) -> Tensor | None:
    """(out,), where the module has biases."""
    return getattr(module, f"{leaf}_bias")[expert] if module.has_bias else None


def expert_by_expert(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    arriving: Callable[[list[int]], Iterable[tuple[int, Product]]],
) -> Tensor:
    """hidden_states (tokens, width); top_k_index and top_k_weights (tokens, k): the experts of each token, and their shares
    → (tokens, width). An index that is no expert of this module adds nothing.

    `arriving` gives the experts that are wanted, in any order: each has rows of its own.
    """
    k = top_k_index.shape[1]
    order = top_k_index.flatten().argsort(stable=True)  # pairs of token and expert, expert by expert
    counts = top_k_index.flatten().bincount(minlength=module.num_experts).tolist()
    entering = hidden_states[order // k]
    out = torch.zeros_like(entering)
    normed = getattr(module, "has_post_expert_norm", False)  # transformers before 5.18 knows of none
    ends = list(accumulate(counts, initial=0))
    for expert, product in arriving([expert for expert, count in enumerate(counts[: module.num_experts]) if count]):
        pairs = slice(ends[expert], ends[expert + 1])
        up = product("gate_up_proj" if module.has_gate else "up_proj", entering[pairs])
        down = product("down_proj", module._apply_gate(up) if module.has_gate else module.act_fn(up))
        out[pairs] = module.post_expert_norm(down) if normed else down
    weighted = torch.empty_like(out, dtype=torch.promote_types(out.dtype, top_k_weights.dtype))
    weighted[order] = out * top_k_weights.flatten()[order, None]  # (pairs, width), back in the order of the tokens
    return weighted.view(-1, k, weighted.shape[-1]).sum(dim=1).to(hidden_states.dtype)
