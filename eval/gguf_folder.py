"""A dense Llama folder as llama.cpp's GGUF, bf16 and without a vocabulary: what its library needs to be timed.

The package `gguf` is that of llama.cpp's own source tree.
"""

# pyright: basic
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(folder: Path, file: Path) -> None:
    """`folder` is a bf16 Llama by transformers."""
    import gguf  # pyright: ignore[reportMissingImports]

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(folder.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float((config.get("rope_parameters") or config).get("rope_theta", 10000.0)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for key in tensors.keys():
                name, tensor = _renamed(key), tensors.get_tensor(key)
                if "q_proj" in key or "k_proj" in key:
                    tensor = _interleaved(tensor, heads if "q_proj" in key else key_heads)
                if tensor.dim() == 1:
                    writer.add_tensor(name, tensor.float().numpy())
                else:
                    halves = tensor.contiguous().view(torch.uint8).numpy().reshape(len(tensor), -1)
                    writer.add_tensor(name, halves, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(key: str) -> str:
    if key in OUTSIDE:
        return OUTSIDE[key]
    _, _, block, rest = key.split(".", 3)
    return f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order that llama.cpp rotates: pairs next to each other, where transformers rotates halves."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).transpose(1, 2).reshape(weight.shape)
