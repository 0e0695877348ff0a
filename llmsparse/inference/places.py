"""Where in a transformers model the weights lie that can be packed, and what each is called there."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmsparse.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def matrices(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """Every weight that can be packed while it loads: its name, and whether it is laid out (in, out).

    Of experts, those that transformers runs through its experts interface: the others do not say how they are laid out.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield f"{path}.weight", isinstance(module, Conv1D)
        elif hasattr(module, "is_transposed"):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    yield f"{path}.{leaf}", bool(module.is_transposed)


def place_of(model: nn.Module, name: str) -> tuple[Any, nn.Parameter | None]:
    """A module and its parameter; None for what there is not."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None, None
    return module, module._parameters.get(leaf)


def name_in(model: PreTrainedModel, name: str) -> str | None:
    """What a weight of the packed folder is called in this model, which may be the folder's without its head, or with
    one that the folder lacks. None for a weight of the head that is not there."""
    prefix = f"{model.base_model_prefix}."
    for own in (name, name.removeprefix(prefix), prefix + name):
        if place_of(model, own)[1] is not None:
            return own
    return None if model.base_model is model and not name.startswith(prefix) else name


def check_shape(name: str, parameter: nn.Parameter | None, described: Mapping[str, Any]) -> nn.Parameter:
    """The model's parameter, which a packed weight must fit. CheckpointError."""
    shape = list(described["shape"])
    if described.get("transposed"):
        shape[-2:] = shape[:-3:-1]
    if parameter is None or list(parameter.shape) != shape:
        wanted = "no such weight" if parameter is None else f"{list(parameter.shape)}"
        raise CheckpointError(f"{name}: packed as {shape}, the model has {wanted}; they do not belong together")
    return parameter
