"""Experts of a mixture that leave inputs out, dense, packed or on disk.

They run expert by expert whatever implementation of experts a model is set to: none of the others knows of inputs that are
left out. For few tokens on the CPU only the columns are read that count; for that weights lie column by column.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse.backends.cpu import columns, pages
from llmsparse.backends.cpu.columns import Columns
from llmsparse.backends.cpu_columns import COLUMNS, TOKENS
from llmsparse.inference.cut_product import by_columns, moved
from llmsparse.inference.gradient import wants_gradient
from llmsparse.inference.packed_experts import CUT, PackedStack, sparse_experts
from llmsparse.inference.recast import recast, refuse_absent
from llmsparse.models.experts import matrix_of_expert, runs_by_expert
from llmsparse.models.thresholds import ExpertRules, Thresholds


class CutStack:
    """The rules of one parameter, by expert, and a dense weight as the kernel reads it."""

    def __init__(self, rules: ExpertRules) -> None:
        self.rules = rules
        self.columns: list[Columns] = []  # in the memory of the parameter
        self._at = 0  # where that is

    def __getstate__(self) -> dict[str, Any]:
        return {"rules": self.rules}  # a copy has a parameter of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.rules, self.columns, self._at = state["rules"], [], 0

    def product(self, weight: Tensor, transposed: bool, expert: int, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x (tokens, in) → (tokens, out) from the columns that count of the parameter `weight`, + bias; None where torch must
        run it."""
        if torch.compiler.is_compiling() or type(weight) is not nn.Parameter or len(x) > columns.MOST:
            return None
        if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu") or wants_gradient(x, weight, bias):
            return None
        if weight.data_ptr() != self._at:  # loaded anew, or a copy
            self.look(weight, transposed)
        return columns.product(self.columns[expert], self.rules[expert].cut, x, bias) if self.columns else None

    def look(self, weight: Tensor, transposed: bool) -> None:
        """Read the columns where a parameter has them side by side; else there are none."""
        lying = weight.data if transposed else weight.data.transpose(-1, -2)  # (experts, in, out)
        there = lying.is_contiguous() and columns.usable(weight)
        self._at, self.columns = weight.data_ptr(), [Columns.of(one.T) for one in lying] if there else []


class CutExperts(nn.Module):
    """Mixed into the class of a model's experts by `cut_experts`."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        run: Any = sparse_experts
        return run(self, hidden_states, top_k_index, top_k_weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CutExperts:
        super()._apply(fn, recurse)
        stacks: dict[str, CutStack] = vars(self)[CUT]
        for leaf, stack in stacks.items():
            stack.rules = tuple(moved(rule, fn) for rule in stack.rules)
            _lay_out(self, leaf)
        return self


def cut_experts(module: Any, leaf: str, name: str, thresholds: Thresholds) -> None:
    """Let the experts of a loaded module leave out what enters their parameter `leaf`, called `name` in the config."""
    refuse_absent(module, leaf, name)
    rules = thresholds.apply_experts(name, _weights(module, leaf), module.num_experts)
    vars(module).setdefault(CUT, {})[leaf] = CutStack(rules)
    if not isinstance(module, CutExperts):
        recast(module, _cut(type(module)))
    _lay_out(module, leaf)


def uncut_experts(module: nn.Module) -> None:
    """Let experts see all of their inputs again."""
    if isinstance(module, CutExperts):
        vars(module).pop(CUT)
        recast(module, type(module).__mro__[2])


def holds_experts(module: Any, leaf: str) -> bool:
    """Whether `leaf` is a weight of the experts of a module that can run one by one."""
    if not runs_by_expert(module):
        return False
    return leaf in vars(module).get("stacks", ()) or getattr(module._parameters.get(leaf), "ndim", 0) == 3


def cut_stacks(model: nn.Module) -> Iterator[tuple[str, str, int | None]]:
    """The parameters of experts that leave inputs out, what runs them, and for how many tokens it reads only the columns of the
    others."""
    for path, module in model.named_modules():
        stacks: dict[str, CutStack] = vars(module).get(CUT, {})
        for leaf, stack in stacks.items():
            packed = vars(module).get("stacks", {}).get(leaf)
            if stack.columns:
                yield f"{path}.{leaf}", COLUMNS.name, columns.MOST
            elif isinstance(packed, PackedStack) and packed.by_columns:
                yield f"{path}.{leaf}", COLUMNS.name, TOKENS
            else:
                yield f"{path}.{leaf}", "torch" if packed is None else packed.choice.backend, None


def _weights(module: Any, leaf: str) -> Iterator[Tensor]:
    """The matrix (out, in) of each expert, unpacked one by one."""
    stack = vars(module).get("stacks", {}).get(leaf)
    if isinstance(stack, PackedStack) and stack.together:
        yield from stack.matrices[0].dense()
    elif isinstance(stack, PackedStack):
        yield from (matrix.dense() for matrix in stack.matrices)
    elif stack is not None:
        yield from stack.unpacked()
    else:
        yield from (matrix_of_expert(module, leaf, expert).detach() for expert in range(module.num_experts))


def _lay_out(module: Any, leaf: str) -> None:
    """Let weights lie column by column where a kernel can run them."""
    held: CutStack = vars(module)[CUT][leaf]
    stack = vars(module).get("stacks", {}).get(leaf)
    if isinstance(stack, PackedStack):
        if not stack.together and not stack.by_columns:
            stack.let_lie(by_columns)
        return
    if stack is not None:
        return
    parameter = getattr(module, leaf)
    lying = parameter.data if module.is_transposed else parameter.data.transpose(-1, -2)  # (experts, in, out)
    if columns.usable(parameter) and not lying.is_contiguous():
        lying = pages.zeros(lying.shape, lying.dtype).copy_(lying)
        parameter.data = lying if module.is_transposed else lying.transpose(-1, -2)
    held.look(parameter, module.is_transposed)


@cache
def _cut(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Cut{kind.__name__}", (CutExperts, kind), {})
