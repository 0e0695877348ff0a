"""Routers are told by what becomes of their output: it only chooses. Names and places are not asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

import llmsparse
from llmsparse.errors import CheckpointError
from llmsparse.models.meta_run import run_on_meta
from tests.architectures import random_model, stream, tiny_config

WIDTH, EXPERTS = 8, 4


class Layers(nn.Module):
    """A block of named matrices, all (WIDTH, WIDTH) but for `score`, which gives one number an expert, and `gate`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        for name in ("first", "second", "value"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.score = nn.Linear(WIDTH, EXPERTS + (way == "shared rows"), bias=False)
        self.gate = nn.Linear(WIDTH, 1, bias=False)
        self.experts = nn.Parameter(torch.empty(EXPERTS, WIDTH, WIDTH))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, way = hidden_states[0], self.way
        routed = self.second(self.first(x).relu()) if way in ("deep", "used besides") else x
        scores = self.score(routed)[:, :EXPERTS]
        if way == "cast":
            scores = routed.double() @ self.score.weight.double().T
        weights, chosen = self.choose(scores)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            mixed = x[token] @ self.experts[expert].T
            out.index_add_(0, token, mixed * weights[token, place, None].to(x.dtype))
        if way == "used besides":
            out = out + self.first(x)
        return hidden_states + out + self.value(x) * self.gate(x).sigmoid()

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of two experts a token, (tokens, 2) each."""
        if self.way == "sort":
            ranked = scores.softmax(-1).sort(-1, descending=True)
            return ranked.values[:, :2], ranked.indices[:, :2]
        if self.way == "argmax":
            chosen = scores.argmax(-1, keepdim=True)
            return scores.gather(1, chosen), chosen
        if self.way == "max":
            weights, chosen = scores.max(-1, keepdim=True)
            return weights, chosen
        if self.way == "groups":  # the best group first, then the best of it
            group = scores.view(-1, 2, EXPERTS // 2).amax(-1).topk(1).indices
            scores = scores.masked_fill(torch.arange(EXPERTS) // 2 != group, 0.0)
        chosen = scores.sigmoid().topk(2).indices
        return scores.sigmoid().gather(1, chosen), chosen


class Toy(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embedding = nn.Embedding(11, WIDTH)
            self.layers = nn.ModuleList(Layers(way) for _ in range(2))
            self.head = nn.Linear(WIDTH, 11, bias=False)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2), name_or_path="toy")

    def get_decoder(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(ids)
        for block in self.layers:
            hidden = block(hidden)
        return SimpleNamespace(logits=self.head(hidden))


def routers(way: str) -> set[str]:
    model: Any = Toy(way)
    found = run_on_meta(model, list(model.layers), torch.device("cpu")).routers
    assert {name.replace("layers.0", "layers.1") for name in found} == {name for name in found if "layers.1" in name}
    return {name.split(".")[2] for name in found}


@pytest.mark.parametrize("way", ["topk", "sort", "argmax", "max", "groups", "shared rows"])
def test_scores_that_are_chosen_from_are_a_router_however_that_is_spelled(way: str) -> None:
    assert routers(way) == {"score", "gate"}


def test_what_leads_to_scores_alone_belongs_to_the_router() -> None:
    assert routers("deep") == {"first", "second", "score", "gate"}


def test_what_feeds_a_router_and_something_else_besides_is_an_ordinary_matrix() -> None:
    assert routers("used besides") == {"second", "score", "gate"}


class Quantized(Layers):
    """Scales activations by their largest, as 8-bit products do: a value is looked up, nothing is chosen."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        made = self.value(hidden_states)
        return hidden_states + self.second(made / made.abs().max(-1, keepdim=True).values.clamp_min(1.0))


def test_a_largest_value_chooses_nothing() -> None:
    model: Any = Toy("topk")
    with torch.device("meta"):
        model.layers = nn.ModuleList(Quantized("topk") for _ in range(2))
    assert run_on_meta(model, list(model.layers), torch.device("cpu")).routers == set()


INKLING = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "sliding_window": 8,
}


@pytest.mark.skipif("inkling_text" not in CONFIG_MAPPING, reason="this transformers does not know inkling_text")
def test_a_router_with_rows_for_shared_experts_is_left_alone(tmp_path: Path) -> None:
    random_model(CONFIG_MAPPING["inkling_text"](**INKLING)).save_pretrained(tmp_path)
    model = stream(tmp_path)
    (router,) = [weight for weight in model.weights(1) if weight.name.endswith("mlp.gate")]
    assert router.shape == (5, 32) and router.kind == "router" and not router.prunable


@pytest.mark.skipif("deepseek_v32" not in CONFIG_MAPPING, reason="this transformers does not know deepseek_v32")
def test_what_picks_the_tokens_to_attend_to_is_left_alone_too(tmp_path: Path) -> None:
    shape = tiny_config("deepseek_v3").to_dict() | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
    shape = {key: value for key, value in shape.items() if key not in ("model_type", "architectures", "head_dim")}
    random_model(CONFIG_MAPPING["deepseek_v32"](**shape)).save_pretrained(tmp_path)
    kinds = {weight.name.split(".", 3)[3]: weight.kind for weight in stream(tmp_path).weights(1)}
    assert {name for name, kind in kinds.items() if kind == "router" and "indexer" in name} == {
        f"self_attn.indexer.{name}" for name in ("wq_b", "wk", "weights_proj")
    }
    assert kinds["self_attn.q_a_proj"] == kinds["self_attn.o_proj"] == "linear"


@pytest.mark.skipif("zaya" not in CONFIG_MAPPING, reason="this transformers does not know zaya")
def test_blocks_that_hand_on_the_state_of_their_router_are_refused(tmp_path: Path) -> None:
    shape = {key: INKLING[key] for key in list(INKLING)[:8]}
    config = CONFIG_MAPPING["zaya"](**shape, num_experts=4, num_experts_per_tok=1, router_hidden_size=16)
    random_model(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="gives a block more of an earlier one than hidden states"):
        stream(tmp_path)


@pytest.mark.parametrize("exclude", [(), ("*.mlp.w1", "*.mlp.v1")])
def test_experts_stored_in_two_dimensions_are_refused_in_the_plan(tmp_path: Path, exclude: tuple[str, ...]) -> None:
    config = CONFIG_MAPPING["dbrx"](
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=97,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )
    random_model(config).save_pretrained(tmp_path / "model")
    (router,) = [weight for weight in stream(tmp_path / "model").weights(0) if "router" in weight.name]
    assert router.kind == "router"
    with pytest.raises(CheckpointError, match=r"mlp\.v1 holds several experts in two dimensions \(6 such tensors\)"):
        llmsparse.plan(
            model=str(tmp_path / "model"), output=str(tmp_path / "out"), sparsity=0.5, exclude=exclude, seq_len=32
        )


@pytest.mark.skipif("zamba" not in CONFIG_MAPPING, reason="this transformers does not know zamba")
def test_blocks_that_are_one_on_disk_are_refused_in_the_plan_and_by_pack(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["zamba"](
        hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
        vocab_size=97, max_position_embeddings=64, attn_layer_period=3, attn_layer_offset=2, mamba_d_state=4,
        mamba_dt_rank=4, n_mamba_heads=2, attention_head_dim=16,
    )  # fmt: skip
    model = random_model(config)
    with torch.no_grad():
        model.get_parameter("model.layers.2.shared_transf.feed_forward.down_proj.weight").mul_(0).add_(0.0)
    model.save_pretrained(tmp_path / "model")
    wanted = r"blocks 2 and 5 share their weights .* zamba cannot be pruned or packed"
    with pytest.raises(CheckpointError, match=wanted):
        llmsparse.plan(model=str(tmp_path / "model"), output=str(tmp_path / "out"), sparsity=0.5, seq_len=32)
    with pytest.raises(CheckpointError, match=wanted):
        llmsparse.pack(str(tmp_path / "model"), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_weights_in_8_bit_floats_are_refused_in_the_plan(tmp_path: Path) -> None:
    random_model(tiny_config("llama")).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {
        key: tensor.to(torch.float8_e4m3fn) if "_proj" in key else tensor for key, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    wanted = r"q_proj\.weight is stored in 8-bit floats .* start from the checkpoint in 16 or 32 bits"
    with pytest.raises(CheckpointError, match=wanted):
        llmsparse.plan(model=str(tmp_path / "model"), output=str(tmp_path / "out"), sparsity=0.5, seq_len=32)
    with pytest.raises(CheckpointError, match=r"_proj\.weight is stored in 8-bit floats"):
        llmsparse.factorize(
            model=str(tmp_path / "model"), output=str(tmp_path / "out"), experts=4, shared=1, active=1, seq_len=32
        )
    assert not (tmp_path / "out").exists()
