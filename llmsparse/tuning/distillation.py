"""Student and teacher, loaded whole, and what passes through their FFNs in one forward of each."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmsparse.inference.load import load_model
from llmsparse.models.empty_model import find_blocks, quiet
from llmsparse.tuning.mixture import Mixture
from llmsparse.tuning.plan import TunePlan


class ForwardOfBoth(NamedTuple):
    """One batch through both: logits (batch, tokens, vocabulary), and of each mixture, tokens flattened:"""

    student: Tensor
    teacher: Tensor
    entered: list[Tensor]  # what the teacher's FFN was given (tokens, hidden)
    wanted: list[Tensor]  # and what it gave
    given: list[Tensor]  # what the mixture gave in its place
    logits: list[Tensor]  # its router's logits (tokens, routed)
    chosen: list[Tensor]  # the experts that ran (tokens, active) int64


class Recording:
    """What `keep` makes of the input and output of some modules in their last forward, until it is taken."""

    def __init__(self, modules: Sequence[nn.Module], keep: Callable[[Tensor, Any], Any]) -> None:
        self.kept: list[Any] = [None] * len(modules)
        self._keep = keep
        for index, module in enumerate(modules):
            module.register_forward_hook(self._note(index))

    def take(self) -> list[Any]:
        """Of each module; held here no longer, so that a graph lives no longer than the losses made of it."""
        taken, self.kept = self.kept, [None] * len(self.kept)
        return taken

    def _note(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.kept[index] = self._keep(args[0], output)

        return hook


class Distillation:
    """`student` is the factorized model and `mixtures` its routed FFNs; `teacher` is dense and never changes."""

    def __init__(self, student: Any, teacher: Any, mixtures: list[Mixture], numbers: list[int]) -> None:
        self.student, self.teacher, self.mixtures = student, teacher, mixtures
        blocks = find_blocks(teacher)[1]
        gates = [mixture.gate for mixture in mixtures]
        self._dense = Recording(
            [blocks[number].get_submodule("mlp") for number in numbers], lambda x, y: (_flat(x), _flat(y))
        )
        self._mixed = Recording([mixture.module for mixture in mixtures], lambda x, y: _flat(y))
        self._logits = Recording(gates, lambda x, scored: scored[0])
        self._chosen = Recording(gates, lambda x, scored: scored[2])  # numbers of experts, no part of a graph

    def teach(self, ids: Tensor) -> Tensor:
        """The teacher's logits for ids (batch, tokens)."""
        with torch.no_grad():
            return self.teacher(input_ids=ids, use_cache=False).logits

    def sharpen(self, ids: Tensor) -> None:
        """Set the scale of all routers' scores by what enters the teacher's FFNs for ids (batch, tokens)."""
        self.teach(ids)
        for mixture, (x, _) in zip(self.mixtures, self._dense.take(), strict=True):
            mixture.sharpen(x)

    def see(self, ids: Tensor) -> ForwardOfBoth:
        """Both models on ids (batch, tokens); gradients reach the student alone."""
        taught = self.teach(ids)
        said = self.student(input_ids=ids, use_cache=False).logits
        entered, wanted = zip(*self._dense.take(), strict=True)
        return ForwardOfBoth(
            said, taught, [*entered], [*wanted], self._mixed.take(), self._logits.take(), self._chosen.kept
        )

    def loads(self) -> list[Tensor]:
        """Of the student's last forward, how many tokens each routed expert ran for: (routed,) int64 a mixture."""
        return [
            chosen.flatten().bincount(minlength=mixture.routed).cpu()
            for mixture, chosen in zip(self.mixtures, self._chosen.kept, strict=True)
        ]


def _flat(hidden: Tensor) -> Tensor:
    return hidden.flatten(0, -2)


def load_both(plan: TunePlan) -> Distillation:
    """Student in fp32, teacher in the dtype of the products, both on the device."""
    with quiet():
        student = load_model(plan.folder, device=plan.device, dtype="float32")
        teacher = load_model(plan.teacher, device=plan.device, dtype=str(plan.dtype).removeprefix("torch."))
    one_by_one = plan.device.type == "cuda" or plan.dtype != torch.float32  # grouped products know no mixed precision
    student.set_experts_implementation("eager" if one_by_one else "grouped_mm")
    path, blocks = find_blocks(student)
    mixtures = [
        Mixture(f"{path}.{number}.mlp", blocks[number].get_submodule("mlp"), plan.container, plan.active)
        for number in plan.mixtures
    ]
    teacher.requires_grad_(False)
    return Distillation(student.eval(), teacher.eval(), mixtures, plan.mixtures)
