"""The training loop; the state on disk is always that of a whole step.

Weights are fp32 masters whatever the checkpoint's dtype, for an AdamW step is smaller than half the distance between
two bfloat16 numbers; products are in the plan's dtype. Gradients are clipped after the backward pass. The learning
rates rise for a few steps and fall along a cosine.

A step is made of forwards of a few windows each. Of several processes each makes its own; their gradients are added up in
the tree of `ranks/tree.py`, so all take the same step, which is that of one process alone. What sums up gradients process
by process (DistributedDataParallel, under accelerate too) would take another one with every number of them.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportPrivateUsage=false
from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from llmsparse.errors import CheckpointError, MachineError, NumericalError
from llmsparse.runs.progress import Progress
from llmsparse.storage.disk import disk_error, fsync
from llmsparse.tuning.distillation import Distillation
from llmsparse.tuning.interrupts import Interrupts
from llmsparse.tuning.losses import ROUTER_LOSSES, TERMS, balance, kl, language, layer_error
from llmsparse.tuning.plan import TunePlan
from llmsparse.tuning.trainable import Trainable

BETAS = (0.9, 0.95)
CLIP = 1.0  # of the norm of all gradients together
STRETCHES = 50  # of steps, whose mean losses are kept and shown


@dataclass
class History:
    """Mean losses of each stretch of steps, {"step": the last, term: …}, and what has been spent, across resumes."""

    step: int = 0
    losses: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    pending: list[dict[str, float]] = field(default_factory=list[dict[str, float]])  # of the stretch begun
    seconds: float = 0.0


def rate_at(step: int, plan: TunePlan) -> float:
    """The fraction of the learning rates at a step: up over `warmup` steps, then along a cosine to `final_rate`."""
    recipe = plan.recipe
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    passed = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * passed))


def losses(distillation: Distillation, ids: Tensor, plan: TunePlan) -> dict[str, Tensor]:
    """Every term that has a weight, for a batch (batch, tokens)."""
    weights, seen = plan.recipe.weights, distillation.see(ids)
    layers = [*zip(distillation.mixtures, seen.entered, seen.wanted, seen.given, seen.logits, seen.chosen, strict=True)]
    choosing = [layer for layer in layers if layer[0].chooses]
    router_loss = ROUTER_LOSSES[plan.recipe.router_loss]
    terms: dict[str, Callable[[], Any]] = {
        "kl": lambda: kl(seen.student, seen.teacher),
        "layer": lambda: sum(layer_error(given, wanted) for _, _, wanted, given, _, _ in layers),
        "router": lambda: sum(router_loss(mixture, x, y) for mixture, x, y, _, _, _ in choosing),
        "balance": lambda: sum(
            balance(mixture.scores(logits), chosen) for mixture, _, _, _, logits, chosen in choosing
        ),
        "language": lambda: language(seen.student, ids),
    }
    return {name: torch.as_tensor(terms[name](), device=ids.device) for name in TERMS if weights[name]}


class Training:
    """A run of `train` and its state."""

    def __init__(self, distillation: Distillation, trainable: Trainable, plan: TunePlan, state: Path) -> None:
        self._plan, self._trainable, self._state = plan, trainable, state
        self._distillation, self.history = distillation, History()
        self._ids = plan.windows.ids.to(plan.device)
        routers, experts = [*trainable.routers.values()], [*trainable.experts.values()]
        groups = [
            {"params": routers, "rate": plan.recipe.router_learning_rate},
            {"params": experts, "rate": plan.recipe.rate},
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=plan.recipe.weight_decay)

    def run(self, progress: Progress) -> None:
        """All steps that are left. Saves every so often, at the end, and when interrupted."""
        steps, stretch = self._plan.recipe.steps, max(1, self._plan.recipe.steps // STRETCHES)
        progress.start(-(-steps // stretch))
        if idle := self._plan.idle:
            progress.log(f"tune: {idle}")
        said = "the first steps"
        advance: Callable[[], None] | None = None
        with Interrupts() as interrupts:
            while self.history.step < steps:
                done = self.history.step
                if advance is None or done % stretch == 0:
                    progress.block(said)
                    advance = progress.batches("tuning", min(stretch, steps - done))
                started = time.perf_counter()
                self._step()
                self.history.seconds += time.perf_counter() - started
                advance()
                done = self.history.step
                if done % stretch == 0 or done == steps:
                    said = self._close_stretch()
                stops = any(self._plan.ranks.gather(interrupts.pending))
                if stops or done == steps or done % self._plan.recipe.save_every == 0:
                    self.save()
                if stops:  # wherever a signal came, all stop at one step; one that has come since is of the next
                    interrupts.deliver()
                    if self._plan.ranks.size > 1:
                        raise KeyboardInterrupt

    def _step(self) -> None:
        """One step of the optimizer, over as many forwards as it takes."""
        plan, history = self._plan, self.history
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * rate_at(history.step, plan)
        share, windows = plan.share, plan.schedule[history.step].split(plan.windows_at_once)
        parameters = list(self._trainable.parameters.values())
        found: dict[int, dict[str, float]] = {}

        def leaf(number: int) -> list[Tensor | None]:
            self._optimizer.zero_grad()
            for part in share.leaves[number]:
                found[part] = self._backward(windows[part], len(windows))
            return [parameter.grad for parameter in parameters]

        sums = share.summed_for_all(leaf, both, [parameter.numel() for parameter in parameters])
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        terms = share.collected(found).values()
        history.step += 1
        history.pending.append({name: sum(one[name] / len(windows) for one in terms) for name in next(iter(terms))})

    def _backward(self, windows: Tensor, parts: int) -> dict[str, float]:
        """Add the gradient of some windows, one of so many parts of a step; returns the terms of their loss."""
        plan = self._plan
        with parametrize.cached():
            with plan.autocast():
                terms = losses(self._distillation, self._ids[windows.to(self._ids.device)], plan)
            loss = torch.stack([plan.recipe.weights[name] * term for name, term in terms.items()]).sum()
            if not torch.isfinite(loss):
                raise NumericalError(
                    f"the loss is {loss.item()} in step {self.history.step + 1}; lower --learning-rate, or use --dtype float32"
                )
            (loss / parts).backward()
        return {name: term.item() for name, term in terms.items()}

    def _close_stretch(self) -> str:
        """Put the mean of the last steps into the history; returns it in words. How evenly experts run it says of the last
        forward of the first process alone."""
        history, plan = self.history, self._plan
        mean = {name: sum(step[name] for step in history.pending) / len(history.pending) for name in history.pending[0]}
        mean["loss"] = sum(plan.recipe.weights[name] * value for name, value in mean.items())
        history.losses.append({"step": history.step} | mean)
        history.pending = []
        pace = history.step * plan.batch_size * plan.seq_len / history.seconds
        if not plan.ranks.first:  # it has not made a forward, where there are more processes than parts
            return ""
        load = entropy_of(self._distillation.loads())
        return f"step {history.step}: loss {mean['loss']:.4f}, expert load entropy {load:.3f}, {pace:,.0f} tokens/s"

    def save(self) -> None:
        """Write the state of the last whole step in the place of the one before it; the first process does."""
        with self._plan.ranks.together():
            if self._plan.ranks.first:
                self._write()

    def _write(self) -> None:
        draft = self._state.with_name(self._state.name + ".draft")
        saved = {
            "parameters": {name: value.detach() for name, value in self._trainable.parameters.items()},
            "optimizer": self._optimizer.state_dict(),
            "history": vars(self.history),
        }
        try:
            torch.save(saved, draft)
            fsync(draft)
            os.replace(draft, self._state)
            fsync(self._state.parent)
        except OSError as error:
            raise disk_error(self._state, error) from error
        except RuntimeError as error:  # torch's own writer knows no OSError
            raise MachineError(f"{self._state}: cannot be written; make room, or choose another output") from error

    def resume(self) -> None:
        """Go on from what was saved, if anything was."""
        saved = self._plan.ranks.known(self._read)
        if saved is None:
            return
        with self._plan.ranks.together():
            self._restore(saved)

    def _restore(self, saved: Any) -> None:
        try:
            with torch.no_grad():
                for name, parameter in self._trainable.parameters.items():
                    parameter.copy_(saved["parameters"][name])
            self._optimizer.load_state_dict(saved["optimizer"])
            self.history = History(**saved["history"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise self._corrupt() from error

    def _read(self) -> Any:
        if not self._state.exists():
            return None
        try:
            return torch.load(self._state, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError) as error:
            raise self._corrupt() from error

    def _corrupt(self) -> CheckpointError:
        return CheckpointError(f"{self._state}: corrupt; start anew with --overwrite")


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may not be there."""
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


def entropy_of(loads: list[Tensor]) -> float:
    """Mean over mixtures of the entropy of who runs, from 0 (always the same experts) to 1 (all alike)."""
    found: list[float] = []
    for load in loads:
        share = load.double() / load.sum()
        most = math.log(len(load))
        found.append(-(share * share.clamp_min(1e-30).log()).sum().item() / most if most else 1.0)
    return sum(found) / len(found)
