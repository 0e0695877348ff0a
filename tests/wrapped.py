"""Tiny configs of families that wrap a language model in one that reads images or sound, and checkpoints of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 400  # the test tokenizer's 384, and tokens for images and sound
IMAGE, VIDEO, SOUND, START, END = 395, 394, 393, 392, 391

_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_SLIDING = _TEXT | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_THREE_AXES = _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_EYE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,  # as many as the language model has blocks
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_EYE = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 32,
}
_EAR = {
    "d_model": 16,
    "encoder_ffn_dim": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "num_mel_bins": 8,
    "max_source_positions": 16,
}
_BOUNDED = {"boi_token_index": START, "eoi_token_index": END}
_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_DEEP = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": _BOUNDED
    | {"text_config": _SLIDING, "vision_config": _EYE, "mm_tokens_per_image": 4, "image_token_index": IMAGE},
    "gemma4": {
        "text_config": _SLIDING | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        "vision_config": _EYE,
        "audio_config": None,
        "image_token_id": IMAGE,
        "boi_token_id": START,
        "eoi_token_id": END,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _EYE | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": IMAGE,
    },
    "llama4": _BOUNDED
    | {
        "text_config": _TEXT | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 56},
        "vision_config": _EYE
        | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "pixel_shuffle_ratio": 0.5},
        "image_token_index": IMAGE,
    },
    "qwen2_5_vl": _QWEN | {"text_config": _THREE_AXES, "vision_config": _QWEN_EYE | {"fullatt_block_indexes": [0]}},
    "qwen3_vl": _QWEN | {"text_config": _THREE_AXES, "vision_config": _QWEN_EYE | _DEEP},
    "qwen3_vl_moe": _QWEN | {"text_config": _THREE_AXES | _EXPERTS, "vision_config": _QWEN_EYE | _DEEP},
    "qwen3_5": _QWEN
    | {"text_config": _THREE_AXES | _DELTA, "vision_config": _QWEN_EYE | {"num_position_embeddings": 16}},
    "internvl": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _EYE | {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
        "image_token_id": IMAGE,
    },
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _EYE | {"model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": IMAGE,
    },
    "smolvlm": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _EYE,
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "idefics3": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _EYE,
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "paligemma": {
        "text_config": _TEXT | {"model_type": "gemma"},
        "vision_config": _EYE | {"model_type": "siglip_vision_model", "projection_dim": 32},
        "image_token_index": IMAGE,
        "projection_dim": 32,
    },
    "voxtral": {
        "text_config": _TEXT | {"model_type": "llama"},
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_mel_bins": 8,
            "max_source_positions": 16,
        },
        "audio_token_id": SOUND,
    },
    "qwen2_audio": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "audio_config": _EAR,
        "audio_token_index": SOUND,
    },
    "qwen3_omni_moe_thinker": _QWEN
    | {
        "text_config": _THREE_AXES | _EXPERTS,
        "vision_config": _QWEN_EYE | _DEEP,
        "audio_config": _EAR | {"output_dim": 32, "downsample_hidden_size": 8},
        "audio_token_id": SOUND,
    },
}


def wrapped_config(name: str) -> PretrainedConfig:
    """The tiny config of a family."""
    return CONFIG_MAPPING[name](**WRAPPED[name])


def save_wrapped(name: str, folder: Path, tokenizer: Path | None = None, seed: int = 0) -> Path:
    """A random model of the family, every parameter random, in several shards, with a tokenizer's files if given."""
    torch.manual_seed(seed)
    model: Any = AutoModelForMultimodalLM.from_config(wrapped_config(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and "bias" not in key
            parameter.normal_(0.8 if norm else 0.0, 0.2)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="48KB")
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """By plain transformers, in the class that the folder's `architectures` names, with nothing missing or left over."""
    loaded: Any = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def image_prompt(name: str) -> dict[str, Tensor]:
    """What the family is called with for a prompt of a random image between two pieces of text."""
    generator = torch.Generator().manual_seed(5)
    if name == "gemma3" or name == "llava":
        places, pixels = 4, {"pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
    elif name == "qwen2_5_vl":
        places = 4
        pixels = {
            "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    else:
        raise KeyError(name)
    text = torch.randint(5, 380, (12,), generator=generator)
    ids = torch.cat([text[:5], torch.tensor([START, *[IMAGE] * places, END]), text[5:]])[None]
    extra = {"mm_token_type_ids": (ids == IMAGE).int()} if name == "qwen2_5_vl" else {}
    return {"input_ids": ids, **pixels, **extra}
