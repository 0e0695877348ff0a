"""The implementation of experts called `llmsparse` in transformers: packed experts through their backends, others fused.

AutoModelForCausalLM.from_pretrained(folder, experts_implementation="llmsparse")   # after `import llmsparse`
llmsparse.fuse(model)                                                              # the shared experts too
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llmsparse.backends.choice import AUTO
from llmsparse.errors import MachineError, RecipeError, did_you_mean
from llmsparse.inference.fused_experts import FusedMlp, fuse_mlp, most_tokens, run_experts, unfuse_mlp, why_not
from llmsparse.inference.packed_experts import CUT, sparse_experts
from llmsparse.models.origin import PACKED

ALIGNED = 16  # bytes of a row, for torch's grouped products
_packed: Any = sparse_experts  # expert by expert, packed or not
_said: set[tuple[type, str]] = set()


def llmsparse_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What hf.py registers. hidden_states (tokens, width); top_k_index and top_k_weights (tokens, k) → (tokens, width)."""
    if "stacks" in self.__dict__:
        return _packed(self, hidden_states, top_k_index, top_k_weights)
    if not is_compiling():
        y = run_experts(self, hidden_states, top_k_index, top_k_weights)
        if y is not None:
            return y
        reason = why_not(self)
        if reason is not None and (type(self), reason) not in _said:
            _said.add((type(self), reason))
            warnings.warn(f"{type(self).__name__} cannot run fused: {reason}; transformers' own runs", stacklevel=2)
    return _stock(self)(self, hidden_states, top_k_index, top_k_weights)


def fuse(model: Any, experts: str = AUTO) -> Any:
    """Let the experts of a loaded model run by `experts`, and return the model.

    `llmsparse`: fused for few tokens, shared experts beside them too; MachineError with the reason where it cannot.
    `auto`: the same where it is measured faster, which is on a CPU, else as they are. Any other
    implementation of transformers by its name; RecipeError for one that is not known, a model without
    experts, and one whose experts leave inputs out.
    """
    known = [AUTO, "eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    if experts not in known:
        raise RecipeError(f"experts {experts!r} is not known{did_you_mean(experts, known)}")
    stacked = [(name, one) for name, one in model.named_modules() if hasattr(one, "is_transposed")]
    dense = [(name, one) for name, one in stacked if "stacks" not in vars(one) and CUT not in vars(one)]
    if not dense:
        if experts == AUTO:
            return model
        if any(CUT in vars(one) for _, one in stacked):
            raise RecipeError(
                f"--experts {experts}: the model's experts leave inputs out, and run one by one; leave --experts out"
            )
        if stacked and experts == PACKED:
            return model
        raise RecipeError(f"--experts {experts}: the model has no dense experts that transformers lets others run")
    if experts == AUTO and not all(_faster(one) for _, one in dense):
        return model
    if experts in (AUTO, PACKED):
        for name, one in dense:
            if (reason := why_not(one)) is not None:
                raise MachineError(f"{name} cannot run fused: {reason}; use --experts grouped_mm or auto")
        for name, one in dense:
            _fuse_shared(model, name, one)
    else:
        for module in model.modules():
            unfuse_mlp(module)
    model.set_experts_implementation(PACKED if experts == AUTO else experts)
    return model


def run_by(block: nn.Module, implementation: str) -> nn.Module:
    """The FFN of a block again, with the same weights, and its experts run by `implementation`."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    twin = copy.deepcopy(block, shared)
    for name, module in list(twin.named_modules()):
        if hasattr(module, "is_transposed"):
            config: Any = module.config
            config._experts_implementation = implementation
            if implementation == PACKED:
                _fuse_shared(twin, name, module)
    if implementation != PACKED:
        for module in twin.modules():
            unfuse_mlp(module)
    return twin


def _faster(module: Any) -> bool:
    weight = module.gate_up_proj
    return weight.device.type == "cpu" and most_tokens(weight.device, weight.dtype) > 0 and why_not(module) is None


def _fuse_shared(model: nn.Module, name: str, module: nn.Module) -> None:
    """The gated layers beside the experts, which run for every token."""
    for beside in model.get_submodule(name.rpartition(".")[0]).children():
        if beside is not module and hasattr(beside, "gate_proj") and not isinstance(beside, FusedMlp):
            fuse_mlp(beside)


def _stock(module: Any) -> Any:
    """grouped_mm, or expert by expert where torch cannot address its rows."""
    weights = [weight for weight in module.parameters(recurse=False) if weight.dim() == 3]
    odd = any(weight.shape[-1] * weight.element_size() % ALIGNED for weight in weights)
    return _packed if odd else ALL_EXPERTS_FUNCTIONS["grouped_mm"]
