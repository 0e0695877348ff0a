"""Gated FFNs for few tokens in one call of a kernel: the experts that were chosen, and shared ones beside them.

For as many tokens as a kernel has been measured faster for; more of them, gradients and `torch.compile` are left to the
module's own way, which is transformers'. Why a module cannot run fused at all is said by `why_not`, never kept quiet.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmsparse.backends.cpu import experts as cpu
from llmsparse.backends.cpu.library import DTYPES
from llmsparse.inference.gradient import wants_gradient

NAME = "llmsparse"  # of the implementation of experts
BF16, FP32 = torch.bfloat16, torch.float32
CPU_TOKENS = {  # kernel, dtype → up to how many tokens at once it beats torch on Zen 5 (eval/experts.py): experts, and
    ("avx512-bf16", BF16): (16, 8),  # a gated layer, which all of the tokens go through
    ("avx512", BF16): (16, 4),
    ("avx512", FP32): (16, 16),
    ("avx2", BF16): (16, 4),
    ("avx2", FP32): (16, 16),
    ("portable", BF16): (0, 0),
    ("portable", FP32): (1, 1),
}
GPU_TOKENS = 8  # what the kernel takes
LAYOUT = {  # flag of transformers' experts → what the kernels take, and what else it would be
    "has_gate": (True, "they have no gate"),
    "has_bias": (False, "they have biases"),
    "has_post_expert_norm": (False, "a norm follows each expert"),
    "is_transposed": (False, "they are laid out (in, out)"),
    "is_concatenated": (True, "their gate and up rows alternate"),
}


@dataclass(frozen=True)
class Fusion:
    """What runs a module's FFN: `runs` up to `tokens` tokens at once, `beyond` for more."""

    module: str
    runs: str
    tokens: int | None  # None: any number
    beyond: str
    because: str


class FusedMlp(nn.Module):
    """Mixed into the class of a gated layer by `fuse_mlp`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (..., width) → (..., width)."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        weights = tuple(linear.weight for linear in linears)
        if not torch.compiler.is_compiling() and all(map(plain, linears)) and not wants_gradient(x, *weights):
            rows = x.numel() // x.shape[-1]
            if 0 < rows <= most_tokens(x.device, x.dtype, gated=True) and x.dtype == weights[0].dtype:
                return run_gated(x, *weights)
        return super().forward(x)


def plain(linear: Any) -> bool:
    """Whether it is a product with a weight and no more: no bias, no adapter in its place, no hook."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(linear) is nn.Linear
        and getattr(linear, "bias", None) is None
        and not any(getattr(linear, name) for name in hooks)
    )


def unfuse_mlp(module: nn.Module) -> None:
    """Make a gated layer run as it did before `fuse_mlp`."""
    if isinstance(module, FusedMlp):
        module.__class__ = next(kind for kind in type(module).__mro__[1:] if not issubclass(kind, FusedMlp))


def fuse_mlp(module: nn.Module) -> bool:
    """Make a gated layer without biases run fused, if it is one: it must do on a random token what the kernel does."""
    linears = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if isinstance(module, FusedMlp):
        return True
    if "_hf_hook" in vars(module) or not all(map(plain, linears)):
        return False
    gate, up, down = (one.weight for one in cast("list[nn.Linear]", linears))
    if unusable(gate.device, gate.dtype) is not None:
        return False
    x = torch.randn(1, gate.shape[1], generator=torch.Generator().manual_seed(0)).to(gate.device, gate.dtype)
    with torch.no_grad():
        own, fused = module(x).float(), run_gated(x, gate, up, down).float()
    if not (own - fused).norm() <= 0.02 * own.norm():  # bf16 rounds four times on its way: 0.005
        return False
    module.__class__ = _fused(type(module))
    return True


def run_experts(module: Any, x: Tensor, index: Tensor, shares: Tensor) -> Tensor | None:
    """The experts of transformers' interface: x (tokens, width), index and shares (tokens, k) → (tokens, width), or None
    where the stock implementation must run. An index that is no expert adds nothing."""
    if not 0 < len(x) <= most_tokens(x.device, x.dtype) or why_not(module) is not None:
        return None
    gate_up, down = module.gate_up_proj, module.down_proj
    if x.dtype != gate_up.dtype or wants_gradient(x, gate_up, down, shares):
        return None
    if x.device.type == "cpu":
        return cpu.experts(x, gate_up, down, index, shares)
    inner = gate_up.shape[1] // 2
    return _gpu().experts(x, gate_up[:, :inner], gate_up[:, inner:], down, index, shares)


def run_gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x (..., width), gate and up (inner, width), down (width, inner) → (..., width)."""
    if x.device.type == "cpu":
        return cpu.gated(x, gate, up, down)
    rows = x.reshape(-1, x.shape[-1])
    index, shares = rows.new_zeros(len(rows), 1, dtype=torch.int64), rows.new_ones(len(rows), 1, dtype=torch.float32)
    return _gpu().experts(rows, gate[None], up[None], down[None], index, shares).view(x.shape)


def why_not(module: Any) -> str | None:
    """Why experts of transformers' interface cannot run fused, in a few words; None if they can."""
    weight = module._parameters.get("gate_up_proj")
    place = None if weight is None else (weight.device, weight.dtype)
    known = _VERDICTS.get(module)
    if known is None or known[0] != place:
        known = _VERDICTS[module] = (place, _why_not(module, weight))
    return known[1]


@cache
def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel can run on a device, whatever the module."""
    if device.type == "cpu":
        if dtype not in DTYPES:
            return f"on a CPU for float32 and bfloat16, these are {str(dtype).removeprefix('torch.')}"
        reason = cpu.why_not()
        if reason is None and not CPU_TOKENS[kernel_name(dtype), dtype][0]:
            reason = "this CPU has neither AVX-512 nor AVX2, without which torch is faster in bfloat16"
        return reason
    if device.type != "cuda":
        return f"runs on a CPU or an NVIDIA GPU; the device is {device}"
    for package in ("triton", "triton_ops"):
        if find_spec(package) is None:
            return f"{package} is not installed"
    return _gpu().why_not(dtype, device) or import_module("triton_ops.selftest").experts_wrong(device)


@cache
def most_tokens(device: torch.device, dtype: torch.dtype, gated: bool = False) -> int:
    """Up to how many tokens at once the fused kernel is worth calling, for experts or for a gated layer; 0: never."""
    if unusable(device, dtype) is not None:
        return 0
    return CPU_TOKENS[kernel_name(dtype), dtype][gated] if device.type == "cpu" else GPU_TOKENS


def kernel_name(dtype: torch.dtype) -> str:
    """The CPU kernel for weights of a dtype."""
    return next(iter(cpu.kernels(dtype)))


def fusions(model: Any) -> Iterator[Fusion]:
    """What runs the experts, and the gated layers that run fused, of a loaded model whose experts are not packed."""
    for name, module in model.named_modules():
        if isinstance(module, FusedMlp):
            own = type(module).__mro__[2].__name__
            yield _fusion(name, module.get_parameter("gate_proj.weight"), True, own, "as the module does it")
        elif hasattr(module, "is_transposed") and not {"stacks", "cut"} & vars(module).keys():
            implementation = str(getattr(module.config, "_experts_implementation", "eager"))
            reason = why_not(module) if implementation == NAME else f"the implementation of experts is {implementation}"
            if reason is None:
                yield _fusion(
                    name, module.get_parameter("gate_up_proj"), False, "grouped_mm", "all experts in one product"
                )
            else:
                stock = "grouped_mm" if implementation == NAME else implementation
                yield Fusion(name, stock, None, stock, reason)


def _fusion(name: str, weight: Tensor, gated: bool, beyond: str, how: str) -> Fusion:
    kernel = kernel_name(weight.dtype) if weight.device.type == "cpu" else "triton"
    because = f"only what is needed is read, in one call; for more tokens {how}"
    return Fusion(name, f"{NAME} {kernel}", most_tokens(weight.device, weight.dtype, gated), beyond, because)


def _why_not(module: Any, weight: Tensor | None) -> str | None:
    for flag, (wanted, otherwise) in LAYOUT.items():
        if getattr(module, flag, wanted) != wanted:
            return otherwise
    if weight is None or weight.dim() != 3 or module._parameters.get("down_proj") is None:
        return "they do not hold gate_up_proj and down_proj"
    reason = unusable(weight.device, weight.dtype)
    return reason if reason is not None or _silu(module, weight) else "their gate is not SiLU"


def _silu(module: Any, weight: Tensor) -> bool:
    """A clamp or another activation shows on numbers that reach far."""
    inner = weight.shape[1] // 2
    gate = torch.linspace(-150, 150, 16 * inner, device=weight.device).view(16, inner)
    up = gate.flip(0).roll(1, 1)
    with torch.no_grad():
        own = module._apply_gate(torch.cat((gate, up), dim=-1))
    wanted = functional.silu(gate) * up
    return own.shape == wanted.shape and bool((own - wanted).abs().max() <= 1e-3)


_VERDICTS: WeakKeyDictionary[Any, tuple[Any, str | None]] = WeakKeyDictionary()


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{kind.__name__}", (FusedMlp, kind), {})


def _gpu() -> Any:
    return import_module("triton_ops.expert_gemv")
