"""What a packed folder holds of experts, left there while the rest of the model is loaded."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsparse.errors import RecipeError
from llmsparse.inference.on_disk import ATTRIBUTE, Leaves, OnDisk
from llmsparse.inference.packed_experts import leave_on_disk
from llmsparse.inference.places import check_shape, place_of
from llmsparse.storage.checkpoint import CheckpointReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Leaving:
    """While a model is loaded: which weights stay on disk, if `size` bytes of memory are given to hold some of them."""

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.modules: dict[str, dict[str, tuple[str, Mapping[str, Any], Any]]] = {}

    def takes(self, model: PreTrainedModel, own: str, name: str, described: Mapping[str, Any]) -> bool:
        """Whether a weight, called `name` in the folder, stays; it is no parameter any more then. CheckpointError where it
        does not fit the model."""
        path, _, leaf = own.rpartition(".")
        module, parameter = place_of(model, own)
        if self.size is None or parameter is None or parameter.dim() != 3 or not hasattr(module, "is_transposed"):
            return False
        check_shape(own, parameter, described)
        del module._parameters[leaf]
        vars(module)["_is_hf_initialized"] = True  # else the model's initialization would look for it
        self.modules.setdefault(path, {})[leaf] = (name, described, parameter.dtype)
        return True

    def end(self, model: PreTrainedModel, folder: Path | None, backend: str, optimize: str) -> None:
        """The rest is loaded: experts are read when they are used. RecipeError where that cannot be."""
        if self.size is None:
            return
        if not self.modules or folder is None:
            raise RecipeError("--expert-memory: the model has no packed experts that could stay on disk; leave it out")
        if optimize != "memory":
            raise RecipeError(f"--expert-memory with --optimize {optimize}, which keeps dense copies: use memory")
        if model.device.type != "cpu":
            raise RecipeError(f"--expert-memory is for a CPU, the device is {model.device}; use --device cpu")
        modules: Mapping[str, Leaves] = self.modules
        on_disk = leave_on_disk(model, CheckpointReader(folder), modules, size=self.size, backend=backend)
        vars(model)[ATTRIBUTE] = on_disk


def on_disk_of(model: Any) -> OnDisk | None:
    """Of a loaded model: its experts on disk, if they are."""
    return vars(model).get(ATTRIBUTE)
