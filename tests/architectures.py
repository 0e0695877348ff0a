"""Tiny configs of every family that is tested, and checkpoints made of them.

Two blocks, or four where the family has more than one kind of block. Square matrices and equal widths are avoided
where a mix-up could hide behind them, and wanted in `square`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmsparse.models.streamed import StreamedModel
from llmsparse.storage.checkpoint import CheckpointReader

VOCABULARY = 97

_PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = _PLAIN | {"num_experts_per_tok": 2}
_SLIDING = {"num_hidden_layers": 4, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}

DENSE: dict[str, dict[str, Any]] = {
    "llama": _PLAIN,
    "mistral": _PLAIN | {"sliding_window": 8},
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "apertus": _PLAIN,  # with tensors of no dimension
    "gemma2": _PLAIN | _SLIDING,
    "gemma3_text": _PLAIN | _SLIDING,
    "phi": _PLAIN,
    "phi3": _PLAIN,
    "olmo2": _PLAIN,
    "smollm3": _PLAIN | {"num_hidden_layers": 4},
    "cohere2": _PLAIN | _SLIDING,
    "glm4": _PLAIN,
    "stablelm": _PLAIN,
    "granite": _PLAIN,
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64},
    "gpt_neox": _PLAIN,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY},
}
STATE_SPACE: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 4},
    "jamba": _MOE
    | {
        "num_experts": 4,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_expand": 1,
        "mamba_dt_rank": 4,
    },
    "qwen3_next": _MOE
    | _DELTA
    | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
}
MIXTURE: dict[str, dict[str, Any]] = {
    "mixtral": _MOE | {"num_local_experts": 4},
    "qwen2_moe": _MOE | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": _MOE | {"num_experts": 4, "moe_intermediate_size": 24},
    "olmoe": _MOE | {"num_experts": 4},
    "gpt_oss": _MOE | _SLIDING | {"num_local_experts": 4},
    "deepseek_v3": _MOE
    | _LATENT
    | {"n_routed_experts": 4, "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "granitemoe": _MOE | {"num_local_experts": 4},
    "phimoe": _MOE | {"num_local_experts": 4},
    "glm4_moe": _MOE
    | {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5_moe": _MOE
    | {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "llama4_text": _PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 56},
}
ARCHITECTURES = DENSE | STATE_SPACE | MIXTURE


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    """The tiny config of a family, with options changed."""
    return CONFIG_MAPPING[name](**ARCHITECTURES[name] | changes)


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of this config whose every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and "bias" not in name
            parameter.normal_(0.8 if norm else 0.0, 0.2)
    model.tie_weights()
    return model.eval()


def save_random(config: PretrainedConfig, folder: Path, shard: str = "24KB", seed: int = 0) -> Path:
    """A checkpoint of `random_model` in several shards; returns the folder."""
    random_model(config, seed).save_pretrained(folder, max_shard_size=shard)
    return folder


def stream(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    """The checkpoint, streamed on the CPU."""
    return StreamedModel(CheckpointReader(folder), device=torch.device("cpu"), dtype=dtype)


def windows(*shapes: tuple[int, int], seed: int = 1) -> list[Tensor]:
    """Batches of random ids, (batch, tokens) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, shape, generator=generator) for shape in shapes]
