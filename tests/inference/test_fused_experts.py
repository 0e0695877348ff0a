"""Mixtures in transformers by the implementation `llmsparse`: what stock computes, or a reason why not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import random_model, save_random, tiny_config, windows
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.backends.cpu import experts as kernel
from llmsparse.errors import MachineError, RecipeError
from llmsparse.inference import experts_interface
from llmsparse.inference import fused_experts as fused
from llmsparse.inference.fused_experts import FusedMlp, fuse_mlp, fusions, most_tokens, run_experts, why_not
from llmsparse.inference.load import load_model

if reason := kernel.why_not():
    pytest.skip(f"no CPU kernels here: {reason}", allow_module_level=True)

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "glm4_moe"]
SHARED = {"qwen2_moe": 2, "deepseek_v3": 1, "glm4_moe": 1}  # gated layers beside experts


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    experts_interface._said.clear()
    yield
    experts_interface._said.clear()


def model(family: str, dtype: torch.dtype = FP32, **changes: Any) -> Any:
    return random_model(tiny_config(family, **changes)).to(dtype).requires_grad_(False)


def logits(one: Any, ids: Tensor) -> Tensor:
    return one(ids, use_cache=False).logits


def experts_of(one: nn.Module) -> list[Any]:
    return [module for module in one.modules() if hasattr(module, "is_transposed")]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_text_are_those_of_transformers(family: str) -> None:
    stock = model(family)
    ours = llmsparse.fuse(copy.deepcopy(stock), "llmsparse")
    stock.set_experts_implementation("eager")
    most = most_tokens(CPU, FP32)
    for shape in ((1, 1), (2, 3), (1, most), (3, most)):  # the last are more than run fused
        (ids,) = windows(shape)
        torch.testing.assert_close(logits(ours, ids), logits(stock, ids), rtol=1e-5, atol=1e-5)
    (prompt,) = windows((1, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(prompt, **options), stock.generate(prompt, **options))
    assert sum(isinstance(module, FusedMlp) for module in ours.modules()) == SHARED.get(family, 0)


def test_experts_really_run_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    for name in ("experts", "gated"):
        own = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda x, *rest, own=own: calls.append(len(x)) or own(x, *rest))
    ours = llmsparse.fuse(model("glm4_moe"))
    calls.clear()
    (ids,) = windows((2, 3))
    logits(ours, ids)
    assert calls == [6, 2]  # one layer of experts for six tokens, and its shared one for two windows
    calls.clear()
    logits(ours, windows((1, most_tokens(CPU, FP32) + 1))[0])
    assert calls == []


def test_bfloat16_is_as_close_to_float64_as_transformers() -> None:
    stock = model("mixtral", BF16)
    (ids,) = windows((2, 4))
    exact = logits(llmsparse.fuse(copy.deepcopy(stock).double(), "eager"), ids)
    error = (logits(stock, ids).double() - exact).norm()
    assert (logits(llmsparse.fuse(stock, "llmsparse"), ids).double() - exact).norm() <= 1.2 * error


def test_a_checkpoint_loads_with_it_by_name(tmp_path: Path) -> None:
    folder = save_random(tiny_config("mixtral"), tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").requires_grad_(False)
    ours = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="llmsparse").requires_grad_(False)
    (ids,) = windows((1, 4))
    torch.testing.assert_close(logits(ours, ids), logits(stock, ids), rtol=1e-5, atol=1e-5)


def test_a_fused_model_is_saved_as_it_came(tmp_path: Path) -> None:
    folder = save_random(tiny_config("glm4_moe"), tmp_path / "a", shard="1GB")
    load_model(folder, device=CPU).save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "llmsparse" not in (tmp_path / "b" / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_gradients_flow_as_in_transformers() -> None:
    stock = random_model(tiny_config("glm4_moe"))
    ours = llmsparse.fuse(copy.deepcopy(stock), "llmsparse")
    (ids,) = windows((1, 4))
    for one in (stock, ours):
        one(ids, labels=ids, use_cache=False).loss.backward()
    for (name, a), (_, b) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    assert all(module.gate_up_proj.grad.abs().sum() > 0 for module in experts_of(ours))


def test_it_compiles_without_a_break_by_leaving_it_to_transformers() -> None:
    ours = llmsparse.fuse(model("glm4_moe"), "llmsparse")
    block = ours.model.layers[-1].mlp
    x = torch.randn(1, 3, 32)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), block(x))


def test_an_index_that_is_no_expert_adds_nothing() -> None:
    (experts, *_) = experts_of(model("mixtral"))
    x, shares = torch.randn(2, 32), torch.ones(2, 2)
    alone = run_experts(experts, x, torch.tensor([[1], [2]]), shares[:, :1])
    beside = run_experts(experts, x, torch.tensor([[1, 4], [-1, 2]]), shares)
    assert alone is not None and beside is not None and torch.equal(alone, beside)


def test_half_precision_on_a_cpu_runs_as_it_did_and_says_so() -> None:
    ours = model("mixtral", torch.float16)
    ours.set_experts_implementation("llmsparse")
    with pytest.warns(UserWarning, match="cannot run fused: on a CPU for float32 and bfloat16, these are float16"):
        ours(windows((1, 2))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(windows((1, 2))[0])  # once is enough
    with pytest.raises(MachineError, match=r"mlp\.experts cannot run fused: on a CPU for float32 and bfloat16"):
        llmsparse.fuse(ours, "llmsparse")


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt_oss", {}, "they have biases"),
        ("mixtral", {"hidden_act": "gelu"}, "their gate is not SiLU"),
        ("phimoe", {"hidden_act": "relu"}, "their gate is not SiLU"),
    ],
)
def test_other_experts_are_refused_with_the_reason(family: str, changes: dict[str, Any], reason: str) -> None:
    one = model(family, **changes)
    (ids,) = windows((1, 3))
    wanted = logits(one, ids)
    before = one.config._experts_implementation
    assert llmsparse.fuse(one) is one and one.config._experts_implementation == before
    assert all(why_not(module) == reason for module in experts_of(one))
    with pytest.raises(MachineError, match=reason):
        llmsparse.fuse(one, "llmsparse")
    one.set_experts_implementation("llmsparse")
    assert {(found.runs, found.because) for found in llmsparse.explain(one).experts} == {("grouped_mm", reason)}
    with pytest.warns(UserWarning, match=reason):
        torch.testing.assert_close(logits(one, ids), wanted)


def test_a_clamped_gate_is_no_silu() -> None:
    (experts, *_) = experts_of(model("mixtral"))
    own = experts._apply_gate
    type(experts)._apply_gate, stock = lambda self, x: own(x.clamp(max=100)), type(experts)._apply_gate
    try:
        assert why_not(experts) == "their gate is not SiLU"
    finally:
        type(experts)._apply_gate = stock


def test_a_cpu_without_wide_instructions_keeps_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (fused.unusable, fused.most_tokens):
        cached.cache_clear()
    monkeypatch.setattr(fused, "kernel_name", lambda dtype: "portable")
    one = model("mixtral", BF16)
    try:
        assert llmsparse.fuse(one).config._experts_implementation != "llmsparse"
        with pytest.raises(MachineError, match="neither AVX-512 nor AVX2"):
            llmsparse.fuse(one, "llmsparse")
        assert most_tokens(CPU, FP32) == 1
    finally:
        for cached in (fused.unusable, fused.most_tokens):
            cached.cache_clear()


class Gated(nn.Module):
    def __init__(self, act: nn.Module, bias: bool = False, swapped: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(16, 40, bias=bias) for _ in range(2))
        self.down_proj, self.act_fn, self.swapped = nn.Linear(40, 16, bias=bias), act, swapped

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (self.up_proj, self.gate_proj) if self.swapped else (self.gate_proj, self.up_proj)
        return self.down_proj(self.act_fn(gate(x)) * up(x))


def test_only_a_layer_that_does_what_the_kernel_does_is_fused() -> None:
    assert fuse_mlp(Gated(nn.SiLU()))
    assert fuse_mlp(Gated(nn.SiLU()).to(BF16))
    for other in (Gated(nn.GELU()), Gated(nn.SiLU(), bias=True), Gated(nn.SiLU(), swapped=True), nn.Linear(2, 2)):
        kind = type(other)
        assert not fuse_mlp(other) and type(other) is kind


def test_an_adapter_or_a_hook_put_on_a_fused_layer_is_not_passed_by() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 100

    one = llmsparse.fuse(model("glm4_moe"), "llmsparse")
    layer: Any = next(module for module in one.modules() if isinstance(module, FusedMlp))
    x = torch.randn(1, layer.gate_proj.in_features)
    plain, seen = layer(x), list[int]()
    handle = layer.gate_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer(x), plain)
    assert seen == [1]
    handle.remove()
    adapted = Adapted(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    adapted.weight = layer.up_proj.weight
    layer.up_proj = adapted
    assert (layer(x) - plain).abs().max() > 1


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_another_implementation_takes_the_place_of_all_that_ran_fused(implementation: str) -> None:
    one = llmsparse.fuse(model("glm4_moe"), "llmsparse")
    assert any(isinstance(module, FusedMlp) for module in one.modules())

    llmsparse.fuse(one, implementation)

    assert not any(isinstance(module, FusedMlp) for module in one.modules())
    assert {fusion.runs for fusion in fusions(one)} == {implementation}


def test_names_and_models_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(RecipeError, match=r"experts 'group_mm' is not known; did you mean 'grouped_mm'\?"):
        llmsparse.fuse(model("mixtral"), "group_mm")
    dense = model("llama")
    assert llmsparse.fuse(dense) is dense
    with pytest.raises(RecipeError, match="the model has no dense experts"):
        llmsparse.fuse(dense, "llmsparse")


def test_what_runs_is_explained() -> None:
    found = llmsparse.explain(llmsparse.fuse(model("glm4_moe")))
    name = next(iter(kernel.kernels(FP32)))
    assert found.experts_run_by == {f"llmsparse {name}": 2} and found.choices == []
    assert [one.module for one in found.experts] == ["model.layers.1.mlp.experts", "model.layers.1.mlp.shared_experts"]
    assert [one.beyond for one in found.experts] == ["grouped_mm", "Glm4MoeMLP"]
    assert found.to_json()["experts"][0]["tokens"] == most_tokens(CPU, FP32)
    plain = llmsparse.explain(llmsparse.fuse(model("glm4_moe"), "eager"))
    assert plain.experts_run_by == {"eager": 1} and "implementation of experts is eager" in plain.experts[0].because
