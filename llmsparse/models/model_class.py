"""Which class of transformers a config's model is: a causal language model, or one that wraps a language model.

A model that also reads images or sound is given text alone, and runs in the class that its `architectures` names: its
language model is the part that is streamed, everything else stays as it is.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def auto_class(config: PretrainedConfig, trust_remote_code: bool = False) -> Any:
    """The `AutoModelFor…` that builds the model of `config` as the class that its `architectures` names, or its own code;
    None where that is neither a causal language model nor one that wraps one, as transformers knows them."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
    )

    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or ()):
        return AutoModelForCausalLM
    named: str = (config.architectures or [""])[0]
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    wrapping: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    if causal is not None and named == causal.__name__:
        return AutoModelForCausalLM
    if wrapping is not None and named == wrapping.__name__:
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM if causal is not None and named.endswith("ForCausalLM") else None


def pipeline_tag(config: PretrainedConfig) -> str:
    """What the hub calls the task of a model: what it reads besides text, and that it writes text."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if config.get_text_config() is config:
        return "text-generation"
    reads_sound = any(getattr(config, name, None) is not None for name in ("audio_config", "speech_config"))
    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and getattr(config, "vision_config", None)
    if reads_images:
        return "any-to-any" if reads_sound else "image-text-to-text"
    return "audio-text-to-text" if reads_sound else "text-generation"
