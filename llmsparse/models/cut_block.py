"""A block that is loaded, and runs so that its layers leave inputs out."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmsparse.errors import CheckpointError
from llmsparse.models.empty_model import replaced
from llmsparse.models.experts import bias_of_expert, expert_by_expert, matrix_of_expert, runs_by_expert
from llmsparse.models.thresholds import Applied, ExpertRules, Rule, Thresholds


def can_be_cut(module: nn.Module) -> bool:
    """Whether a module is a linear layer that multiplies as linear layers do."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def matrix_of(module: nn.Module) -> Tensor:
    """The weight (out, in) of a linear layer."""
    weight = cast(Tensor, module.weight)
    return weight.T if isinstance(module, Conv1D) else weight


def weights_of(block: nn.Module, name: str) -> list[Tensor]:
    """The weight (out, in) of a layer of a block, or of each expert where `name` is a parameter of theirs; none where the
    block has neither."""
    path, _, leaf = name.rpartition(".")
    experts = _submodule(block, path)
    if experts is not None and runs_by_expert(experts) and isinstance(getattr(experts, leaf, None), Tensor):
        count = experts.num_experts
        return [matrix_of_expert(experts, leaf, one) for one in range(count)]
    module = _submodule(block, name)
    return [] if module is None else [matrix_of(module)]


def rules_of(thresholds: Thresholds, name: str, block: nn.Module) -> dict[str, Rule]:
    """The rules of a block, by the name of the layer within it."""
    found: dict[str, Rule] = {}
    for layer in thresholds.of_block(name):
        weights = weights_of(block, layer)
        if not weights:
            raise CheckpointError(f"{name}.{layer}: thresholds are given for it, and the model has no such layer")
        of_experts = _submodule(block, layer) is None
        own = f"{name}.{layer}"
        if of_experts:
            found[layer] = thresholds.apply_experts(own, weights, len(weights))
        else:
            found[layer] = thresholds.apply(own, weights[0])
    return found


def refuse_outside(thresholds: Thresholds, blocks: Iterable[str]) -> None:
    """CheckpointError for thresholds of a layer that lies in none of the blocks."""
    inside = {f"{block}.{layer}" for block in blocks for layer in thresholds.of_block(block)}
    for name in thresholds.layers:
        if name not in inside:
            raise CheckpointError(f"{name}: thresholds are given for it, and it is no layer of a block of the model")


@contextmanager
def cutting(block: nn.Module, rules: Mapping[str, Rule]) -> Generator[None]:
    """Within it, these layers of a block leave inputs out."""
    runs: dict[str, Callable[..., Tensor]] = {}
    experts: dict[str, dict[str, ExpertRules]] = {}
    for name, rule in rules.items():
        if isinstance(rule, Applied):
            runs[name] = partial(_linear, block.get_submodule(name), rule)
        else:
            path, _, leaf = name.rpartition(".")
            experts.setdefault(path, {})[leaf] = rule
    for path, some in experts.items():
        module = block.get_submodule(path)
        runs[path] = partial(expert_by_expert, module, arriving=partial(_arriving, module, some))
    own = list(runs.values())
    with replaced([block.get_submodule(name) for name in runs], lambda index, _: own[index]):
        yield


def _linear(module: nn.Module, rule: Applied, x: Tensor) -> Tensor:
    return F.linear(rule.cut(x), matrix_of(module), rule.bias(cast("Tensor | None", module.bias)))


def _arriving(
    module: Any, rules: Mapping[str, ExpertRules], wanted: list[int]
) -> Iterator[tuple[int, Callable[[str, Tensor], Tensor]]]:
    for expert in wanted:
        yield expert, partial(_of_expert, module, rules, expert)


def _of_expert(module: Any, rules: Mapping[str, ExpertRules], expert: int, leaf: str, x: Tensor) -> Tensor:
    weight = matrix_of_expert(module, leaf, expert)
    if leaf not in rules:
        return F.linear(x, weight, bias_of_expert(module, leaf, expert))
    rule = rules[leaf][expert]
    return F.linear(rule.cut(x), weight, rule.bias(bias_of_expert(module, leaf, expert)))


def _submodule(block: nn.Module, name: str) -> Any:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None
