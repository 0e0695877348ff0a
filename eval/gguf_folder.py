"""A dense Llama folder as llama.cpp's GGUF, bf16 and without a vocabulary, which is what its library needs; and the way back.

The package `gguf` is that of llama.cpp's own source tree.
"""

# pyright: basic
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmsparse.models.origin import copy_side_files

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
                name, tensor = renamed(key), tensors.get_tensor(key)
                if heads_of(key, config):
                    tensor = _interleaved(tensor, heads_of(key, config))
                if tensor.dim() == 1:
                    writer.add_tensor(name, tensor.float().numpy())
                else:
                    halves = tensor.contiguous().view(torch.uint8).numpy().reshape(len(tensor), -1)
                    writer.add_tensor(name, halves, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(file: Path, folder: Path, output: Path) -> float:
    """The checkpoint of `folder`, in float32, with the values that a GGUF of it has; the bits that a weight of its linear
    layers takes there."""
    import gguf  # pyright: ignore[reportMissingImports]

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    weights: dict[str, Tensor] = {}
    stored = numel = 0
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for key in tensors.keys():
                tensor, shape = held[renamed(key)], tensors.get_slice(key).get_shape()
                values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(shape)
                if heads_of(key, config):
                    values = _by_halves(values, heads_of(key, config))
                weights[key] = values.float().contiguous()
                if "proj" in key:
                    stored, numel = stored + int(tensor.n_bytes), numel + values.numel()
    output.mkdir(parents=True)
    copy_side_files(folder, output)
    save_file(weights, output / "model.safetensors", {"format": "pt"})
    return 8 * stored / numel


def renamed(key: str) -> str:
    """What llama.cpp calls a tensor."""
    if key in OUTSIDE:
        return OUTSIDE[key]
    _, _, block, rest = key.split(".", 3)
    return f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"


def heads_of(key: str, config: dict[str, Any]) -> int:
    """In how many heads its rows are laid out anew; 0 where they are not."""
    kinds = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    return next((config[heads] for part, heads in kinds.items() if part in key), 0)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order that llama.cpp rotates: pairs next to each other, where transformers rotates halves."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def _by_halves(weight: Tensor, heads: int) -> Tensor:
    return weight.reshape(heads, len(weight) // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
