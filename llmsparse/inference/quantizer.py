"""Packed checkpoints in transformers: the quantizer "llmsparse", registered when this module is imported.

    AutoModelForCausalLM.from_pretrained(packed_folder)
    AutoModelForCausalLM.from_pretrained(pruned_folder, quantization_config=SparseConfig(backend="auto"))

The second packs each weight as it is read. Either way a model is left that runs through backends, and that
`save_pretrained` writes as a packed folder under the names of the module's own tensors.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ExpertsInterface
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmsparse.backends.choice import AUTO, UNPACKING, check_names
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.formats import layout, stored_bytes
from llmsparse.formats.bitmask import Bitmask, describe_unpacked
from llmsparse.inference.counting import count_dense, count_packed
from llmsparse.inference.cut_layers import cut_model
from llmsparse.inference.decode_attention import mark_attention
from llmsparse.inference.dense_linear import quicken
from llmsparse.inference.dequantize import make_dense
from llmsparse.inference.experts_interface import llmsparse_experts
from llmsparse.inference.lean_norm import quicken_norms
from llmsparse.inference.leaving import Leaving
from llmsparse.inference.linear import PackedLayer, SparseLinear, fill, place
from llmsparse.inference.mapped import let_go_of_files
from llmsparse.inference.packed_experts import PackedStack, packed_weights, prepare_experts
from llmsparse.inference.places import check_shape, matrices, name_in, place_of
from llmsparse.inference.read_ahead import read_ahead
from llmsparse.inference.stored_experts import StoredStack
from llmsparse.models.origin import PACKED, read_config
from llmsparse.models.thresholds import block_of
from llmsparse.packing.folder import quantization_config, read_layers, refuse_undescribed
from llmsparse.storage.disk import parse_size
from llmsparse.storage.heap import release_freed
from llmsparse.storage.shard import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOADING = ("backend", "optimize", "expert_memory")  # a user's choice when a model is loaded; not part of the checkpoint
VARIABLE = "LLMSPARSE_BACKEND"  # what runs where nobody chooses: for programs that load a model by its name alone


class SparseConfig(QuantizationConfigMixin):
    """How packed weights are run. `backend`: `auto`, or a name that must be able to run every weight; by default what
    the variable LLMSPARSE_BACKEND says, else `auto`. `optimize`: what to do with more tokens at once than a kernel
    takes: `memory` unpacks the weight at every call, `speed` keeps a dense copy beside it. Raises RecipeError for a
    name that is not known.

    `expert_memory`: packed experts stay on disk, and this many bytes of memory hold those that were used last and those
    that will be next; a number, or such as `2GB`. On a CPU.

    `layers` is what config.json says of the packed weights; leave it out.
    """

    def __init__(
        self,
        backend: str | None = None,
        optimize: str = "memory",
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        expert_memory: str | int | None = None,
    ) -> None:
        self.quant_method: Any = PACKED
        self.backend = backend or os.environ.get(VARIABLE) or AUTO
        self.optimize = optimize
        check_names(self.backend, optimize)
        self.expert_memory = None if expert_memory is None else parse_size(expert_memory, "--expert-memory")
        self.layers = {name: dict(described) for name, described in (layers or {}).items()}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The `quantization_config` of a config.json. CheckpointError for one that this version cannot read."""
        layers = read_layers(Path("config.json"), {"quantization_config": config_dict})
        config = cls(layers=layers, **{key: config_dict[key] for key in LOADING if key in config_dict})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return quantization_config(self.layers)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What of the caller's config holds for a checkpoint that has its own."""
        return {key: getattr(self, key) for key in LOADING}


auto.register_quantization_config(PACKED)(SparseConfig)
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, SparseConfig)
# transformers warns that a packed folder has a config of its own; that is why only LOADING is taken from the caller's
warnings.filterwarnings(
    "ignore", message=r"You passed `quantization_config`.*\['backend', 'optimize', 'expert_memory'\]"
)


class SparseQuantizer(HfQuantizer):
    """Loads packed weights, or packs weights as they are loaded."""

    requires_calibration = False

    def __init__(self, quantization_config: SparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config
        self.candidates: dict[str, bool] = {}  # module tensor that may be packed while loading → laid out (in, out)
        self.layers: dict[str, dict[str, Any]] = {}  # module tensor that is packed → description
        self.leaving = Leaving(quantization_config.expert_memory)
        self.compiles = True
        self.folder: Path | None = None  # that is loaded
        self.experts_before: str | None = None  # the implementation that `dequantize` gives back

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise RecipeError("packed weights cannot be split over processes: load with a device_map, not a tp_plan")
        self.folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        if self.config.expert_memory is None:
            read_ahead(checkpoint_files or ())
        if not self.pre_quantized:
            tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
            self.candidates = {name: transposed for name, transposed in matrices(model) if name not in tied}
            return
        check_headers(self.config.layers, checkpoint_files or ())
        for name, described in self.config.layers.items():
            own = name_in(model, name)
            if own is not None and not self.leaving.takes(model, own, name, described):
                self.hold(model, own, described)

    def hold(self, model: PreTrainedModel, name: str, described: Mapping[str, Any]) -> None:
        """Make room for the packed tensors of a weight, on meta. CheckpointError where they do not fit the model."""
        path, _, leaf = name.rpartition(".")
        module, parameter = place_of(model, name)
        parameter = check_shape(name, parameter, described)
        if type(module).forward in (nn.Linear.forward, Conv1D.forward):
            kind = SparseConv1D if isinstance(module, Conv1D) else SparseLinear
            model.set_submodule(path, kind(described, module.bias, parameter.dtype))
        elif isinstance(module, nn.Linear) or parameter.dim() == 3:
            place(module, leaf, described, parameter.dtype)
        else:
            raise CheckpointError(f"{name}: a {type(module).__name__} cannot be packed, only linear layers and experts")
        self.layers[name] = dict(described)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.candidates

    def get_quantize_ops(self) -> PackWhileLoading:
        return PackWhileLoading(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        cut = self.folder is not None and block_of(read_config(self.folder)) is not None
        if not self.layers and not self.leaving.modules and not cut:
            raise CheckpointError(
                f"{model.config.name_or_path}: no weight has enough zeros to be smaller packed; prune the model first, "
                "or load it without quantization_config"
            )
        options = {"backend": self.config.backend, "optimize": self.config.optimize}
        modules: dict[str, dict[str, dict[str, Any]]] = {}
        for name, described in self.layers.items():
            path, _, leaf = name.rpartition(".")
            modules.setdefault(path, {})[leaf] = described
        for path, leaves in modules.items():
            module = model.get_submodule(path)
            if any(module.get_parameter(leaf).is_meta for leaf in leaves):
                raise RecipeError(f"device_map offloads {path}: packed weights stay on one device; give it more room")
            if isinstance(module, PackedLayer):
                module.prepare(f"{path}.weight", leaves["weight"], **options)
            else:
                prepare_experts(module, path, leaves, **options)
            release_freed()
        self.leaving.end(model, self.folder, **options)
        packed = [weight for _, weight in packed_weights(model)]
        if any(isinstance(weight, PackedStack | StoredStack) and not weight.together for weight in packed):
            self.experts_before = getattr(model.config, "_experts_implementation", None)
            model.set_experts_implementation(PACKED)
            self.compiles = False
        vars(model)["_weight_conversions"] = []  # it is saved under the module's names, whatever they were on disk
        let_go_of_files(model)
        if self.config.backend not in UNPACKING:  # these give the bits of the dense model
            quicken(model)
            quicken_norms(model)
            mark_attention(model)
        count_packed(model)
        if not self.layers and not self.leaving.modules:
            self.remove_quantization_config(model)  # it is saved as the dense model that it is
        return cut_model(model, self.folder) if cut and self.folder else model

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The dense model, in the place of the packed one; in another dtype if one is given."""
        make_dense(model, dtype)
        count_dense(model)
        if self.folder is not None:
            cut_model(model, self.folder)
        if self.experts_before is not None:
            model.set_experts_implementation(self.experts_before)
        vars(model).pop("_weight_conversions")  # transformers finds those of the architecture by itself
        self.remove_quantization_config(model)
        for module in model.modules():
            vars(getattr(module, "config", self)).pop("_is_quantized", None)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called before config and weights are saved."""
        self.config.layers = {name: weight.described for name, weight in packed_weights(model)}
        return None, {}

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes to plan for an element of a tensor that is loaded; the backend `dense` will unpack it."""
        described = self.layers.get(param_name)
        if described is None or self.config.backend not in (AUTO, "dense"):
            return param.element_size()
        size = param.element_size() if param.is_floating_point() else getattr(torch, described["dtype"]).itemsize
        return size * math.prod(described["shape"]) / max(1, math.prod(layout(described)[""][0]))

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True  # adapters on top, and biases; transformers itself refuses to train the packed weights

    @property
    def is_compileable(self) -> bool:
        return self.compiles


class SparseConv1D(PackedLayer, Conv1D):  # pyright: ignore[reportIncompatibleMethodOverride]
    """transformers' Conv1D, a linear layer that is laid out (in, out), with its weight packed."""

    def __init__(self, described: Mapping[str, Any], bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(described, bias, dtype)
        self.nf, self.nx = self.out_features, self.in_features


class PackWhileLoading(ConversionOps):
    """Packs one weight as soon as it is read, if that makes it smaller; else it stays what it is."""

    def __init__(self, quantizer: SparseQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Tensors under their module's names → those that stay dense; the others go to where they belong."""
        model, missing = kwargs["model"], kwargs["missing_keys"]
        left: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            transposed = self.quantizer.candidates[name]
            outputs_first = (weight.mT if transposed else weight).cpu()
            described = describe_unpacked(outputs_first)
            if stored_bytes(described) >= weight.nbytes:
                left[name] = value
                continue
            packed = Bitmask.pack(outputs_first, described["pattern"]).moved(weight.device)
            self.quantizer.hold(model, name, described | ({"transposed": True} if transposed else {}))
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            fill(module, leaf, packed)
            for tensor in (module.get_parameter(leaf), *module.buffers(recurse=False)):
                vars(tensor)["_is_hf_initialized"] = True  # else the model's initialization would fill it anew
            missing.discard(name)
        return left


auto.register_quantizer(PACKED)(SparseQuantizer)
ExpertsInterface.register(PACKED, llmsparse_experts)


def check_headers(layers: Mapping[str, Mapping[str, Any]], files: Sequence[str]) -> None:
    """Hold the files' headers against the config before a tensor is read. CheckpointError naming what does not fit."""
    stored = {name: spec for file in files for name, spec in read_header(Path(file)).specs.items()}
    refuse_undescribed(Path("config.json"), layers, stored)
    for name, described in layers.items():
        for suffix, (shape, dtype) in layout(described).items():
            spec = stored.get(name + suffix)
            if files and spec is None:
                raise CheckpointError(f"{name}: {name + suffix} is not in the files; the packed folder is incomplete")
            if spec is not None and (spec.shape, spec.dtype) != (shape, dtype):
                raise CheckpointError(
                    f"{spec.file}: {name + suffix} is {list(spec.shape)} {spec.dtype}, config.json wants "
                    f"{list(shape)} {dtype}; the packed folder is damaged, pack the checkpoint again"
                )
