"""A packed model made dense again, where it stands: every packed layer becomes the one that it was before."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from llmsparse.inference.cut_experts import uncut_experts
from llmsparse.inference.decode_attention import unmark_attention
from llmsparse.inference.dense_linear import slow_down
from llmsparse.inference.lean_norm import slow_down_norms
from llmsparse.inference.linear import PackedLayer
from llmsparse.inference.on_disk import ATTRIBUTE, OnDisk
from llmsparse.inference.packed_experts import STORED, SparseExperts


def make_dense(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put dense layers in the place of packed ones, one by one; weights keep their dtype unless one is given."""
    for name, module in list(model.named_modules()):
        uncut_experts(module)
        if isinstance(module, PackedLayer):
            model.set_submodule(name, _linear(module, dtype))
        elif isinstance(module, SparseExperts):
            _restore_experts(module, dtype)
    on_disk: OnDisk | None = vars(model).pop(ATTRIBUTE, None)
    if on_disk is not None:
        on_disk.memory.close()
    slow_down(model)
    slow_down_norms(model)
    unmark_attention(model)
    if dtype is not None:
        model.to(dtype)


def _linear(packed: PackedLayer, dtype: torch.dtype | None) -> nn.Module:
    assert packed.matrix is not None
    weight = packed.matrix.dense()
    out, width = weight.shape
    dense: Any = Conv1D(out, width) if packed.matrix.transposed else nn.Linear(width, out, device="meta")
    dense.weight = _parameter(weight.mT if packed.matrix.transposed else weight, dtype)
    dense.bias = packed.bias
    return dense.train(packed.training)


def _restore_experts(module: Any, dtype: torch.dtype | None) -> None:
    stacks = module.__dict__.pop("stacks")
    module.__dict__.pop(STORED, None)
    module.__class__ = next(kind for kind in type(module).__mro__[1:] if not issubclass(kind, SparseExperts))
    for leaf, stack in stacks.items():
        module.register_parameter(leaf, _parameter(stack.dense(), dtype))


def _parameter(weight: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype or weight.dtype).contiguous())
