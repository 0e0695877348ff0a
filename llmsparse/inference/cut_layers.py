"""Linear layers that leave inputs out, dense or packed: a loaded model with the thresholds that stand in its config.

What a layer multiplies is `Cut(x)` (sparsity/activation.py), whatever runs the product. For few tokens on the CPU a dense layer
reads the columns alone that count; for that its weight lies column by column. To everybody else it is the weight that it was.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Conv1D

from llmsparse.backends.cpu import columns
from llmsparse.backends.cpu.columns import Columns
from llmsparse.backends.cpu_columns import COLUMNS, TOKENS, CpuColumns
from llmsparse.errors import CheckpointError
from llmsparse.inference.cut_experts import cut_experts, cut_stacks, holds_experts
from llmsparse.inference.cut_product import by_columns, moved
from llmsparse.inference.decode_attention import mark_attention
from llmsparse.inference.dense_linear import quicken
from llmsparse.inference.gradient import wants_gradient
from llmsparse.inference.lean import LeanLayer
from llmsparse.inference.lean_norm import quicken_norms
from llmsparse.inference.linear import PackedLayer
from llmsparse.inference.recast import recast, refuse_absent
from llmsparse.inference.shared_input import ALONE
from llmsparse.models.cut_block import can_be_cut, matrix_of
from llmsparse.models.origin import read_config
from llmsparse.models.thresholds import Applied, Thresholds, read_thresholds

READ = "inputs are left out, and only the columns of the others are read"
ZEROS = "inputs are left out, and multiplied as zeros"


class _Cut(nn.Module):
    """What layers share that leave inputs out."""

    rule: Applied
    bias: nn.Parameter | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Cut:
        super()._apply(fn, recurse)
        self.rule = moved(self.rule, fn)
        return self


class CutLinear(_Cut, nn.Linear):
    """An `nn.Linear` that leaves inputs out."""

    columns: Columns | None = None  # the weight as the kernel reads it: its own memory

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) → (..., out)."""
        rule, bias = self.rule, self.rule.bias(self.bias)
        if self.columns is not None and self._fits(input, bias):
            return columns.product(self.columns, rule.cut, input, bias)
        return F.linear(rule.cut(input), self.weight, bias)

    def __getstate__(self) -> dict[str, Any]:
        return {key: held for key, held in vars(self).items() if key != "columns"}  # a copy has a weight of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.weight.T.is_contiguous():
            self.lay_out()

    def lay_out(self) -> None:
        """Let the weight lie column by column where the kernel can run it."""
        self.columns = None
        if type(self.weight) is nn.Parameter and columns.usable(self.weight):
            self.columns = Columns.of(self.weight.data)
            self.weight.data = self.columns.values.T

    def _fits(self, x: Tensor, bias: Tensor | None) -> bool:
        weight = self.weight
        if torch.compiler.is_compiling() or not 0 < x.numel() <= columns.MOST * weight.shape[1]:
            return False
        if self.columns is None or weight.data_ptr() != self.columns.values.data_ptr() or x.dtype != weight.dtype:
            return False
        return not torch.is_autocast_enabled("cpu") and not wants_gradient(x, weight, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CutLinear:
        before = self.weight.data_ptr()
        super()._apply(fn, recurse)
        if self.columns is not None and self.weight.data_ptr() != before:
            self.lay_out()
        return self


class CutConv1D(_Cut, Conv1D):  # pyright: ignore[reportIncompatibleMethodOverride]
    """transformers' Conv1D that leaves inputs out."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        return F.linear(self.rule.cut(x), self.weight.T, self.rule.bias(self.bias))


def cut_model(model: Any, folder: Path) -> Any:
    """Let the layers of a loaded model leave out what the config in `folder` says; the model as it is where it says nothing.

    CheckpointError for thresholds that do not belong to the model.
    """
    thresholds = read_thresholds(folder, read_config(folder))
    if thresholds is None:
        return model
    for name in thresholds.layers:
        module, leaf = _place(model, name)
        if leaf:
            cut_experts(module, leaf, name, thresholds)
        else:
            _cut(module, name, thresholds)

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        saved = type(self).save_pretrained(self, save_directory, *args, **kwargs)
        thresholds.write_means(Path(save_directory))
        return saved

    vars(model)["save_pretrained"] = MethodType(save_pretrained, model)
    return model


def cut_dense(model: Any, folder: Path) -> Any:
    """The same for a model of which nothing is packed: what else a token costs is run as in a packed one."""
    if read_thresholds(folder, read_config(folder)) is None:
        return model
    quicken(model)
    quicken_norms(model)
    mark_attention(model)
    return cut_model(model, folder)


def cut_layers(model: nn.Module) -> Iterator[LeanLayer]:
    """The layers of a model that leave inputs out, and what runs them."""
    for name, module in model.named_modules():
        if isinstance(module, CutLinear | CutConv1D) or (isinstance(module, PackedLayer) and module.rule is not None):
            matrix = module.matrix if isinstance(module, PackedLayer) else None
            if isinstance(module, CutLinear) and module.columns is not None:
                yield LeanLayer(name, COLUMNS.name, columns.MOST, READ)
            elif matrix is not None and isinstance(matrix.backend, CpuColumns):
                yield LeanLayer(name, COLUMNS.name, TOKENS, READ)
            else:
                runs = matrix.choice.backend if matrix is not None else "torch"
                yield LeanLayer(name, runs, None, ZEROS)
    for name, runs, tokens in cut_stacks(model):
        yield LeanLayer(name, runs, tokens, ZEROS if tokens is None else READ)


def _place(model: Any, name: str) -> tuple[nn.Module, str]:
    """A layer of the model; of experts their module and the name of the parameter."""
    prefix = f"{model.base_model_prefix}."
    for own in (name, name.removeprefix(prefix)):
        for path, leaf in ((own, ""), own.rpartition(".")[::2]):
            try:
                module = model.get_submodule(path)
            except AttributeError:
                continue
            if not leaf or holds_experts(module, leaf):
                return module, leaf
    raise CheckpointError(f"{name}: config.json gives a threshold for it, and the model has no such layer")


def _cut(module: nn.Module, name: str, thresholds: Thresholds) -> None:
    refuse_absent(module, "weight", name)
    if isinstance(module, PackedLayer):
        assert module.matrix is not None
        module.rule = thresholds.apply(name, module.matrix.dense())
        module.matrix = by_columns(module.matrix)
        module.group = ALONE
        return
    if not can_be_cut(module) and not isinstance(module, nn.Linear):
        raise CheckpointError(
            f"{name}: config.json gives a threshold for it, and a {type(module).__name__} has no inputs to leave out"
        )
    layer: Any = module
    layer.rule = thresholds.apply(name, matrix_of(module))
    recast(layer, CutConv1D if isinstance(module, Conv1D) else CutLinear)
    if isinstance(layer, CutLinear):
        layer.lay_out()
