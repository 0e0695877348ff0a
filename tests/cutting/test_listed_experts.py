"""Experts that are modules in a list, as code beside a checkpoint may have them: each is a layer, met by the tokens routed to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import llmsparse

EXPERTS = 4


class ListedConfig(LlamaConfig):
    model_type = "llama_of_listed_experts"


class Mixture(nn.Module):
    """Every token goes to one of the experts."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, EXPERTS, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(EXPERTS))

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (rows,) = (chosen == number).nonzero(as_tuple=True)
            out[rows] = expert(flat[rows])
        return out.view(hidden.shape)


class ListedModel(LlamaForCausalLM):
    config_class = ListedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Mixture(config)
        self.post_init()


@pytest.mark.parametrize("allocation", ["greedy", "uniform"])
def test_each_weighs_as_much_as_tokens_meet_it(allocation: str, tmp_path: Path) -> None:
    AutoConfig.register(ListedConfig.model_type, ListedConfig, exist_ok=True)
    AutoModelForCausalLM.register(ListedConfig, ListedModel, exist_ok=True)
    torch.manual_seed(0)
    config = ListedConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=97
    )  # fmt: skip
    ListedModel(config).save_pretrained(tmp_path / "model")
    save_file({"input_ids": torch.randint(0, 97, (16, 32))}, tmp_path / "ids.safetensors")
    report = llmsparse.activations(
        str(tmp_path / "model"), output=tmp_path / "cut", sparsity=0.5, allocation=allocation, device="cpu", dtype="float32",
        calibration=str(tmp_path / "ids.safetensors"), calibration_samples=8, seq_len=32,
    )  # fmt: skip
    for block in report.blocks:
        met = {layer.name.removeprefix(f"{block.name}."): layer.met for layer in block.layers}
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            shares = [met[f"mlp.experts.{number}.{leaf}"] for number in range(EXPERTS)]
            assert sum(shares) == pytest.approx(1.0) and max(shares) < 0.6
        assert met["self_attn.q_proj"] == 1.0
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)  # of what a token is multiplied with
