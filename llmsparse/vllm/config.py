"""The `quantization_config` of a packed folder, as vLLM asks for it: which layers hold packed weights, and how they run."""

# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUntypedBaseClass=false, reportUnknownArgumentType=false, reportUnknownParameterType=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from llmsparse.errors import CheckpointError
from llmsparse.inference.quantizer import SparseConfig
from llmsparse.models.origin import PACKED
from llmsparse.models.thresholds import block_of
from llmsparse.vllm.method import PackedHeadMethod, PackedLinearMethod


class PackedConfig(QuantizationConfig):
    """What a packed folder says of its weights, under the names of vLLM's modules before they are merged."""

    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        self.layers: dict[str, dict[str, Any]] = config.layers
        self.options = {"backend": config.backend, "optimize": config.optimize}

    def get_name(self) -> str:
        return PACKED

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it stands in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """Raises CheckpointError for one that a later llmsparse wrote, and for weights that are not run here."""
        read: SparseConfig = SparseConfig.from_dict(config)
        refuse_others(read.layers)
        return cls(read)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, **_: Any) -> None:
        """Called with the model's whole config."""
        if hf_config is not None and block_of(hf_config.to_dict()) is not None:
            raise CheckpointError(
                f"{model_name}: leaves inputs out by thresholds of activations, which vLLM does not; run it by `llmsparse serve`, "
                "or pack the model that `llmsparse activations` started from"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def sources(self, prefix: str) -> list[str]:
        """The weights, as the folder names them, that the layer of vLLM at `prefix` holds one below the other."""
        path, _, leaf = prefix.rpartition(".")
        names: list[str] = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{path}.{name}.weight".removeprefix(".") for name in names]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """None leaves a layer to vLLM."""
        names = self.sources(prefix)
        packed = any(name in self.layers for name in names)
        if isinstance(layer, LinearBase):
            return PackedLinearMethod(self, prefix, names) if packed else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead) and packed:
            return PackedHeadMethod(self, prefix, names)
        return None


def refuse_others(layers: Mapping[str, Mapping[str, Any]]) -> None:
    """CheckpointError naming a packed weight that is not of a linear layer."""
    for name, described in layers.items():
        what = (
            "experts"
            if len(described["shape"]) > 2
            else "a layer laid out (in, out)"
            if described.get("transposed")
            else ""
        )
        if what:
            raise CheckpointError(
                f"{name}: packed weights of {what} are not run in vLLM; run the folder by `llmsparse serve`, or give vLLM what "
                "`llmsparse unpack` makes of it"
            )
