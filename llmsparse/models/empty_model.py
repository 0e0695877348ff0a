"""A model without its weights: parameters on meta, buffers real, ready to be filled part by part.

Uses transformers' `_get_dtype_plan` and `_no_split_modules`, the same from 5.15 to 5.23.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from llmsparse.errors import CheckpointError, checkpoint_at_fault
from llmsparse.models.model_class import auto_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

RECORDS = ("output_hidden_states", "output_attentions", "output_router_logits")


def build_empty(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """The model of `config` in eval mode, as `from_pretrained(dtype=dtype)` would build it, but for its weights.

    Experts run one by one (`eager`), so that each expert's input can be seen.
    """
    for flag in RECORDS:  # a block's extra outputs would be recorded, and never used
        if getattr(config, flag, False):
            setattr(config, flag, False)
    file = Path(str(config.name_or_path)) / "config.json"
    with checkpoint_at_fault(file, "build this model"), init_empty_weights(include_buffers=False), _LargeOnMeta():
        model: PreTrainedModel = auto_class(config, trust_remote_code).from_config(
            config, dtype=dtype, experts_implementation="eager", trust_remote_code=trust_remote_code
        )
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(pattern.search(name) for pattern in kept):
            assign(model, name, tensor.to(torch.float32))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model.eval().requires_grad_(False)


def find_blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Name of the list of blocks, and the blocks: the outermost list as long as the config says the language model is deep.

    Where several are, the one whose modules the model declares unsplittable. Towers beside the decoder have none.
    """
    depth: int | None = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    inside = set(model.get_decoder().modules())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and module in inside
    ]
    declared = set(model._no_split_modules or ())
    for name, blocks in lists:
        if {type(block).__name__ for block in blocks} & declared:
            return name, list(blocks)
    if not lists:
        raise CheckpointError(
            f"{model.config.name_or_path}: {type(model).__name__} has no list of {depth} blocks "
            "(num_hidden_layers of its config); only models that are a stack of blocks can be pruned"
        )
    name, blocks = lists[0]
    return name, list(blocks)


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor.detach(), requires_grad=False)


def drop(module: nn.Module) -> None:
    """Put all parameters of a module back on meta."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def stand_in(model: nn.Module, part: str, device: torch.device) -> None:
    """Let the parameters of a module that never runs be zeros that take no memory: some models ask their first parameter
    which device they are on."""
    for name, parameter in model.get_submodule(part).named_parameters(part):
        assign(model, name, torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape))


@contextmanager
def replaced(
    blocks: Sequence[nn.Module], forward: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Generator[None]:
    """Within it, each block's forward is `forward(index, its own)`."""
    own = [block.forward for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = forward(index, own[index])
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def returning(value: Any) -> Callable[[int, Callable[..., Any]], Callable[..., Any]]:
    """For `replaced`: a forward that returns `value`, whatever it is called with."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return value

    def replace(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        return forward

    return replace


@contextmanager
def quiet() -> Generator[None]:
    """Within it, transformers keeps its advice to itself: it is meant for whoever wrote the model call."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


class _LargeOnMeta(TorchFunctionMode):
    """Tensors too large to be buffers are never allocated, not even for the moment until they become parameters."""

    LARGE = 2**22

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            shape = func(*args, **kwargs | {"device": "meta"})
            if shape.numel() > self.LARGE:
                return shape
        return func(*args, **kwargs)


class Recorded(Exception):
    """Ends a forward whose rest is not wanted."""


def caught(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """The first argument that `module` is called with while `run` runs, which ends there."""
    found: list[Tensor] = []

    def catch(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(entering: Tensor) -> Any:
            found.append(entering)
            raise Recorded

        return call

    with replaced([module], catch), suppress(Recorded):
        run()
    return found[0]
