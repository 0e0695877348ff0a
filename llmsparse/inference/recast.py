"""A module of a loaded model that becomes one of another class, whose forward runs from then on."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from llmsparse.errors import MachineError, RecipeError


def recast(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let a module be a `kind`. Where accelerate's hooks are on it, or were, it holds its forward itself, bound to what it was;
    RecipeError for a forward that is none of its classes'."""
    held: dict[str, Any] = vars(module)
    own = [vars(before).get("forward") for before in type(module).__mro__]
    name = "_old_forward" if "_old_forward" in held else "forward"
    if name in held:
        if getattr(held[name], "__func__", None) not in own:
            raise RecipeError(
                f"a {type(module).__name__} runs a forward that was put in the place of its own, so its inputs cannot be left out; "
                "load the model with its thresholds first"
            )
        held[name] = MethodType(kind.forward, module)
    module.__class__ = kind


def refuse_absent(module: nn.Module, leaf: str, name: str) -> None:
    """MachineError for a weight that is not in memory."""
    parameter = dict(module.named_parameters(recurse=False)).get(leaf)
    if parameter is not None and parameter.is_meta:
        raise MachineError(
            f"{name}: its weight is offloaded, and which inputs count is computed from it; load the model without offloading, "
            "on a device that holds it or on the CPU"
        )
