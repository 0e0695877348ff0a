"""How good a model in training is: perplexity on held-out windows, and how evenly its experts are used."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from typing import Any

import torch

from llmsparse.errors import CheckpointError
from llmsparse.models.likelihood import perplexity_of
from llmsparse.tuning.distillation import Distillation
from llmsparse.tuning.losses import language
from llmsparse.tuning.plan import TunePlan


@torch.no_grad()
def held_out_losses(plan: TunePlan, models: dict[str, Any]) -> dict[str, float]:
    """Perplexity of each model on the held-out windows. CheckpointError where it is no number."""
    found: dict[str, float] = {}
    held_out = plan.windows.held_out
    for name, model in models.items():
        total = 0.0
        for ids in held_out.to(plan.device).split(plan.windows_at_once):
            with plan.autocast():
                logits = model(input_ids=ids, use_cache=False).logits
            total += language(logits, ids).item() * len(ids)
        found[name] = perplexity_of(total, len(held_out))
        if not math.isfinite(found[name]):
            raise CheckpointError(
                f"{plan.teacher if name == 'teacher' else plan.folder}: its perplexity is {found[name]}, so it holds NaN "
                "or Inf; repair the checkpoint"
            )
    return found


@torch.no_grad()
def expert_loads(plan: TunePlan, distillation: Distillation) -> list[list[float]]:
    """Of each mixture, the share of the held-out tokens that each routed expert runs for."""
    totals = [torch.zeros(mixture.routed, dtype=torch.int64) for mixture in distillation.mixtures]
    for ids in plan.windows.held_out.to(plan.device).split(plan.windows_at_once):
        with plan.autocast():
            distillation.student(input_ids=ids, use_cache=False)
        totals = [total + load for total, load in zip(totals, distillation.loads(), strict=True)]
    return [(total / plan.windows.held_out.numel()).tolist() for total in totals]
