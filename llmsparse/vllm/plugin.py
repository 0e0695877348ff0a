"""What vLLM calls in each of its processes, because of the entry point `vllm.general_plugins` in pyproject.toml."""

# pyright: reportMissingImports=false, reportUnknownVariableType=false
from __future__ import annotations

from llmsparse.models.origin import PACKED


def register() -> None:
    """Make vLLM know the `quant_method` of packed folders. May be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from llmsparse.vllm.config import PackedConfig

    register_quantization_config(PACKED)(PackedConfig)
