"""How good a model in training is: perplexity on held-out windows, and how evenly its experts are used."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.models.likelihood import perplexity_of
from llmsparse.tuning.distillation import Distillation
from llmsparse.tuning.losses import language
from llmsparse.tuning.plan import TunePlan


@torch.no_grad()
def held_out_losses(plan: TunePlan, models: dict[str, Any]) -> dict[str, float]:
    """Perplexity of each model on the held-out windows. CheckpointError where it is no number."""
    found: dict[str, float] = {}
    parts = plan.windows.held_out.split(plan.windows_at_once)
    share = plan.share_of(parts)
    for name, model in models.items():
        sums: dict[int, float] = {}
        for number in share.numbers:
            ids = parts[number].to(plan.device)
            with plan.autocast():
                logits = model(input_ids=ids, use_cache=False).logits
            sums[number] = language(logits, ids).item() * len(ids)
        found[name] = perplexity_of(sum(share.collected(sums).values()), len(plan.windows.held_out))
        with share.ranks.together():
            if not math.isfinite(found[name]):
                raise CheckpointError(
                    f"{plan.teacher if name == 'teacher' else plan.folder}: its perplexity is {found[name]}, so it holds "
                    "NaN or Inf; repair the checkpoint"
                )
    return found


@torch.no_grad()
def expert_loads(plan: TunePlan, distillation: Distillation) -> list[list[float]]:
    """Of each mixture, the share of the held-out tokens that each routed expert runs for."""
    parts = plan.windows.held_out.split(plan.windows_at_once)
    share = plan.share_of(parts)
    loads: dict[int, list[Tensor]] = {}
    for number in share.numbers:
        with plan.autocast():
            distillation.student(input_ids=parts[number].to(plan.device), use_cache=False)
        loads[number] = distillation.loads()
    totals = [torch.stack(some).sum(0) for some in zip(*share.collected(loads).values(), strict=True)]
    return [(total / plan.windows.held_out.numel()).tolist() for total in totals]
