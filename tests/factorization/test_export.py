"""With every expert active a factorized model is the dense one, in whichever container it is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, random_model, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmsparse.errors import CheckpointError, NumericalError, RecipeError
from llmsparse.factorization.containers import Shape, check_source, choose_container
from llmsparse.factorization.export import slots, specs, tensors
from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.pipeline import factorize
from llmsparse.factorization.router import Router
from llmsparse.factorization.split import Layout, Split

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WIDE = {"num_hidden_layers": 3, "intermediate_size": 44}  # 44 neurons: experts of 11, stored as 16
PAIRS: list[tuple[str, dict[str, Any], str, int, str]] = [  # source, its options, container, shared slots, blocks kept
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, "glm4_moe", 1, "none"),
    ("llama", {"tie_word_embeddings": True}, "mixtral", 0, "none"),
    ("llama", {}, "mixtral", 0, "none"),
    ("llama", {"tie_word_embeddings": True}, "qwen2_moe", 1, "none"),
    ("llama", {}, "qwen2_moe", 1, "0,-1"),
    ("mistral", {"sliding_window": None, "head_dim": 24}, "glm4_moe", 2, "0"),
    ("mistral", {"sliding_window": 8, "head_dim": 24}, "mixtral", 0, "none"),
    ("mistral", {"sliding_window": 8}, "qwen2_moe", 1, "none"),
    ("qwen2", {}, "glm4_moe", 1, "none"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "qwen2_moe", 1, "1"),
    ("qwen3", {"head_dim": 24}, "glm4_moe", 1, "none"),
    ("qwen3", {"head_dim": 24, "attention_bias": True}, "qwen3_moe", 0, "-1"),
    ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}, "qwen3_moe", 0, "none"),
]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = torch.randint(3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(1))
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": ids}, file)
    return file


@pytest.mark.parametrize(("source", "options", "container", "shared", "kept"), PAIRS)
def test_all_active_equals_dense(
    source: str, options: dict[str, Any], container: str, shared: int, kept: str, tokens: Path, tmp_path: Path
) -> None:
    dense = random_model(tiny_config(source, **WIDE, **options))
    dense.save_pretrained(tmp_path / "dense")
    report = factorize(
        model=str(tmp_path / "dense"), output=str(tmp_path / "out"), experts=4, shared=shared, active=4 - shared,
        keep_dense=kept, container=container, refit=False, scale="none", router_steps=1, calibration=str(tokens),
        calibration_samples=8, device="cpu", max_shard_size="20KB",
    )  # fmt: skip
    assert report.container == container
    assert all(block.routing.captured > 1 - 1e-5 for block in report.blocks)
    made, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert made.config.model_type == container
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, got = dense(ids).logits, made(ids).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    one, other = (
        model.generate(ids[:, :8], max_new_tokens=12, do_sample=False, pad_token_id=0) for model in (dense, made)
    )
    assert torch.equal(one, other)

    made.save_pretrained(tmp_path / "again")
    ours: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        ours |= load_file(file)
    tied = "tie_word_embeddings" in options and container in ("qwen2_moe", "qwen3_moe")  # others are served untied
    assert made.config.tie_word_embeddings == tied
    assert tied == ("lm_head.weight" not in ours)
    if "tie_word_embeddings" in options and not tied:
        assert torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"])
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = {key for file in (tmp_path / "again").glob("*.safetensors") for key in load_file(file)}
    assert ours.keys() == again


def shape(config: PretrainedConfig, shared: int = 1, kept: Sequence[int] = (), experts: int = 4) -> Shape:
    return Shape(config, Layout(48, experts, shared, active=1), kept)


def test_auto_takes_the_first_container_that_holds_the_source() -> None:
    assert choose_container("auto", shape(tiny_config("llama"))).name == "glm4_moe"
    assert choose_container("auto", shape(tiny_config("llama"), shared=0)).name == "mixtral"
    assert choose_container("auto", shape(tiny_config("qwen3"), shared=0)).name == "qwen3_moe"
    assert choose_container("auto", shape(tiny_config("mistral", sliding_window=8))).name == "qwen2_moe"
    assert choose_container("auto", shape(tiny_config("qwen2"), kept=[0, 1])).name == "glm4_moe"
    assert choose_container("auto", shape(tiny_config("qwen2"), kept=[1])).name == "qwen2_moe"


@pytest.mark.parametrize(
    ("container", "source", "options", "message"),
    [
        ("mixtral", "qwen3", {}, "mixtral cannot hold this qwen3: it lacks the attention of qwen3; use --container glm4"),
        ("mixtral", "llama", {}, "has no shared experts"),
        ("glm4_moe", "llama", {"shared": 0}, "needs a shared slot .*; use --container mixtral"),
        ("glm4_moe", "llama", {"kept": [1]}, "keeps only the first blocks dense; use --container qwen2_moe"),
        ("glm4_moe", "llama", {"shared": 3}, "needs 2 or more routed experts"),
        ("auto", "qwen3", {"kept": [1]}, "no container holds this qwen3 .*: glm4_moe keeps only"),
        ("auto", "qwen2", {"shared": 0}, "glm4_moe needs a shared slot"),
    ],
)  # fmt: skip
def test_containers_that_cannot_hold_a_source_say_why(
    container: str, source: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        choose_container(container, shape(tiny_config(source), **options))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("mixtral", {}, "mixture of experts already"),
        ("glm4_moe", {}, "mixture of experts already"),
        ("gemma2", {}, "gemma2 cannot be factorized; sources are llama, mistral, qwen2, qwen3"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "uses gelu"),
    ],
)
def test_sources_that_cannot_be_factorized_are_refused(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        check_source(tiny_config(source, **options), "the model")
    assert "\n" not in str(refused.value)


def test_planned_shapes_are_those_that_are_written_and_padding_is_zero() -> None:
    layout = Layout(20, experts=2, shared=1, active=1)  # slots of 16: 16 shared, 4 routed and 12 zeros
    container = choose_container("qwen2_moe", shape(tiny_config("llama")))
    ffn = FFN(torch.randn(20, 6), torch.randn(20, 6), torch.randn(6, 20))
    split = Split(torch.arange(16), (torch.arange(16, 20),))
    router = Router(torch.randn(1, 6), torch.zeros(1), "softmax", 1)
    written = tensors(container, layout, "b.", ffn, split, router, torch.bfloat16)
    assert specs(container, layout, "b.", 6, torch.bfloat16) == {
        k: (tuple(t.shape), t.dtype) for k, t in written.items()
    }
    down, gate = written["b.mlp.experts.0.down_proj.weight"], written["b.mlp.experts.0.gate_proj.weight"]
    assert torch.equal(down[:, :4], ffn.down[:, 16:].bfloat16()) and not down[:, 4:].any() and not gate[4:].any()
    assert torch.equal(written["b.mlp.shared_expert.down_proj.weight"], (2 * ffn.down[:, :16]).bfloat16())
    assert [slot.width for slot in slots(container, layout)] == [16, 16]


def test_factors_that_carry_a_value_beyond_the_dtype_are_an_error_that_names_it() -> None:
    layout = Layout(20, experts=2, shared=1, active=1)
    ffn = FFN(torch.randn(20, 6), torch.randn(20, 6), torch.randn(6, 20))
    container = choose_container("qwen2_moe", Shape(tiny_config("llama"), layout, ()))
    split = Split(torch.arange(16), (torch.arange(16, 20),))
    router = Router(torch.randn(1, 6), torch.zeros(1), "softmax", 1)
    ffn.down[2, 3] = 4e4  # of the shared expert, which is written twice as large
    assert tensors(container, layout, "b.", ffn, split, router, torch.bfloat16)
    with pytest.raises(NumericalError, match=r"b\.mlp\.shared_expert\.down_proj\.weight: holds values that float16"):
        tensors(container, layout, "b.", ffn, split, router, torch.float16)


def test_config_is_complete(tokens: Path, tmp_path: Path) -> None:
    """What vLLM and other readers take from the file, not from transformers' defaults."""
    random_model(tiny_config("llama")).save_pretrained(tmp_path / "dense")
    factorize(
        model=str(tmp_path / "dense"), output=str(tmp_path / "out"), experts=4, shared=1, active=1,
        router_steps=1, calibration=str(tokens), device="cpu",
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {
        "architectures": ["Glm4MoeForCausalLM"],
        "n_routed_experts": 3,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": False,
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
        "head_dim": 8,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert config["rope_parameters"]["partial_rotary_factor"] == 1.0
