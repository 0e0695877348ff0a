"""The modules that a packed checkpoint loads into, by themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llmsparse.errors import CheckpointError
from llmsparse.formats.bitmask import Bitmask
from llmsparse.inference.linear import SparseLinear, fill, place
from llmsparse.inference.packed_experts import SparseExperts, packed_weights, prepare_experts, sparse_experts


def sparse(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight.masked_fill_(torch.rand(shape, generator=generator) < 0.7, 0.0)


def linear(weight: Tensor, backend: str = "dense", optimize: str = "memory", **described: Any) -> SparseLinear:
    packed = Bitmask.pack(weight)
    what = packed.describe() | described
    module = SparseLinear(what, nn.Parameter(torch.ones(len(weight))), weight.dtype)
    fill(module, "weight", packed)
    module.prepare("up.weight", what, backend, optimize)
    return module


def test_it_waits_on_meta_in_the_shapes_that_are_on_disk() -> None:
    packed = Bitmask.pack(sparse(6, 12))
    module = SparseLinear(packed.describe(), None, torch.float32)
    waiting = module.state_dict()
    assert {name: tensor.shape for name, tensor in waiting.items()} == {
        f"weight{end}": tensor.shape for end, tensor in packed.tensors().items()
    }
    assert all(tensor.is_meta for tensor in waiting.values())


def test_loaded_it_holds_no_neutral_tensor_and_saves_them_all() -> None:
    weight = sparse(6, 12)
    module = linear(weight)
    assert [name for name, _ in module.named_parameters()] == ["bias"] and not list(module.buffers())
    packed = Bitmask.pack(weight)
    saved = module.state_dict()
    assert all(torch.equal(saved[f"weight{end}"], tensor) for end, tensor in packed.tensors().items())
    assert "backend=dense" in repr(module)


def test_the_weight_can_be_read_as_the_module_would_hold_it() -> None:
    weight = sparse(6, 12)
    assert torch.equal(linear(weight).weight, weight)
    assert torch.equal(linear(weight, transposed=True).weight, weight.T)
    with pytest.raises(AttributeError, match="wieght"):
        linear(weight).wieght  # noqa: B018


@pytest.mark.parametrize("backend", ["dense", "dense-lowmem", "cpu-bitmask"])
@pytest.mark.parametrize("optimize", ["memory", "speed"])
@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 33])
def test_any_number_of_tokens_will_do(backend: str, optimize: str, tokens: int) -> None:
    weight, x = sparse(6, 12), torch.randn(tokens, 12, generator=torch.Generator().manual_seed(1))
    module = linear(weight, backend, optimize)
    torch.testing.assert_close(module(x), functional.linear(x, weight, torch.ones(6)))
    kernel = backend == "cpu-bitmask"
    assert module.matrix is not None and (module.matrix.copy is not None) == (kernel and optimize == "speed")


@pytest.mark.parametrize("backend", ["dense", "dense-lowmem", "cpu-bitmask"])
def test_it_can_be_moved_and_copied(backend: str) -> None:
    weight = sparse(6, 12)
    module = copy.deepcopy(linear(weight, backend)).to(torch.bfloat16)
    assert torch.equal(module.weight, weight.bfloat16()) and module.bias is not None
    assert module(torch.ones(1, 12).bfloat16()).dtype == module.bias.dtype == torch.bfloat16
    assert module.matrix is not None and module.matrix.choice.backend == backend
    assert module.state_dict()["weight"].dtype == torch.bfloat16


def test_a_damaged_weight_is_refused_before_it_runs() -> None:
    packed = Bitmask.pack(sparse(6, 12))
    assert packed.offsets is not None
    packed.offsets[2] += 1
    module = SparseLinear(packed.describe(), None, torch.float32)
    fill(module, "weight", packed)
    with pytest.raises(CheckpointError, match=r"up\.weight: mask and offsets disagree"):
        module.prepare("up.weight", packed.describe())


class Experts(nn.Module):
    """Three experts as transformers lays them out, 8 wide and 10 inside."""

    num_experts, has_gate, has_bias, has_post_expert_norm, is_transposed = 3, True, True, False, False

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = sparse(3, 20, 8), sparse(3, 8, 10, seed=1)
        self.gate_up_proj = nn.Parameter(up.mT.contiguous() if transposed else up)
        self.down_proj = nn.Parameter(down.mT.contiguous() if transposed else down)
        self.gate_up_proj_bias = nn.Parameter(sparse(3, 20, seed=2))
        self.down_proj_bias = nn.Parameter(sparse(3, 8, seed=3))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up


def packed_experts(backend: str, transposed: bool) -> Experts:
    experts = Experts(transposed).requires_grad_(False)
    described: dict[str, dict[str, Any]] = {}
    for leaf in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, leaf)
        packed = Bitmask.pack((weight.mT if transposed else weight).contiguous())
        described[leaf] = packed.describe() | ({"transposed": True} if transposed else {})
        place(experts, leaf, described[leaf], weight.dtype)
        fill(experts, leaf, packed)
    prepare_experts(experts, "mlp.experts", described, backend)
    return experts


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Six tokens, each to two of the experts 0 and 2; nobody asks expert 1, and one asks one that is not here."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    index = torch.tensor([[0, 2], [2, 0], [0, 2], [0, 2], [2, 0], [2, 3]])
    return x, index, torch.rand(6, 2, generator=torch.Generator().manual_seed(6))


def by_hand(experts: Experts, x: Tensor, index: Tensor, share: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for place_, expert in enumerate(index[token].tolist()):
            if expert < experts.num_experts:
                up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
                if experts.is_transposed:
                    up, down = up.T, down.T
                inner = experts._apply_gate(up @ x[token] + experts.gate_up_proj_bias[expert])
                out[token] += share[token, place_] * (down @ inner + experts.down_proj_bias[expert])
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", ["dense", "dense-lowmem", "cpu-bitmask"])
def test_each_expert_runs_on_the_tokens_routed_to_it(backend: str, transposed: bool) -> None:
    dense = Experts(transposed).requires_grad_(False)
    expected = by_hand(dense, *routed())
    experts = packed_experts(backend, transposed)
    assert isinstance(experts, SparseExperts) and isinstance(experts, Experts)
    torch.testing.assert_close(sparse_experts(experts, *routed()), expected)
    torch.testing.assert_close(sparse_experts(dense, *routed()), expected)  # experts that are not packed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", ["dense", "dense-lowmem", "cpu-bitmask"])
def test_experts_hand_out_and_save_what_they_were_made_of(backend: str, transposed: bool) -> None:
    dense, experts = Experts(transposed), packed_experts(backend, transposed)
    for leaf in ("gate_up_proj", "down_proj"):
        weight = getattr(dense, leaf).detach()
        assert torch.equal(getattr(experts, leaf), weight)
        packed = Bitmask.pack((weight.mT if transposed else weight).contiguous())
        saved = experts.state_dict()
        assert all(torch.equal(saved[leaf + end], tensor) for end, tensor in packed.tensors().items())
    assert [name for name, _ in packed_weights(nn.ModuleDict({"mlp": experts}))] == [
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ]
    half = copy.deepcopy(experts).to(torch.bfloat16)
    assert torch.equal(half.down_proj, dense.down_proj.detach().bfloat16())


def test_experts_of_a_transformers_that_knows_no_norm_behind_them() -> None:
    class Older(Experts):
        @property
        def has_post_expert_norm(self) -> bool:  # type: ignore[override]
            raise AttributeError("transformers before 5.18")

    older = Older().requires_grad_(False)
    torch.testing.assert_close(sparse_experts(older, *routed()), by_hand(Experts().requires_grad_(False), *routed()))
