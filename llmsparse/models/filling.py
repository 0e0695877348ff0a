"""What of a model is in memory: tensors read from disk and put into the module, and let go of again."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmsparse.errors import CheckpointError
from llmsparse.models.empty_model import assign
from llmsparse.models.naming import Naming
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.shard import is_finite


class Filler:
    """Fills a model without weights from `reader`. `tied`: what is not on disk → what it is tied to."""

    def __init__(
        self,
        model: PreTrainedModel,
        reader: CheckpointReader,
        naming: Naming,
        tied: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self._model, self._reader, self._naming, self._tied, self._device = model, reader, naming, tied, device
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self._parameters = dict(model.named_parameters(remove_duplicate=False)).keys()
        self._loaded = False  # what lies outside the blocks and embeddings

    def load(self, part: str, beside: Sequence[str]) -> None:
        """Load an embedding, and the keys `beside` the blocks and embeddings, unless they are there."""
        if beside and not self._loaded:
            self.fill(self.read(beside))
        self._loaded = True
        if self._model.get_parameter(part).is_meta:
            self.fill(self.read(self._naming.groups[self._tied.get(part, part)].keys))

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Tensors from disk. CheckpointError for a parameter that holds NaN or Inf."""
        for key, tensor in (tensors := self._reader.read(keys)).items():
            if self._naming.target(key) in self._parameters and not is_finite(tensor):
                what = f"{key.removesuffix('.weight')} in {self._reader.folder}"
                raise CheckpointError(f"{what} holds NaN or Inf; repair the checkpoint")
        return tensors

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put on-disk tensors into the model, cast to the dtype that each has there; always copies."""

        def prepare(target: str, tensor: Tensor) -> Tensor:
            return tensor.to(self._device, self._dtypes[target], copy=True)

        for name, tensor in self._naming.to_module(tensors, prepare):
            wanted = self._model.get_parameter_or_buffer(name).shape
            if tensor.shape != wanted:
                raise CheckpointError(
                    f"{self._reader.folder}: {name} has shape {list(tensor.shape)} on disk, config.json asks for "
                    f"{list(wanted)}; they do not belong together"
                )
            for same in (name, *(tied for tied, origin in self._tied.items() if origin == name)):
                assign(self._model, same, tensor)

    def drop(self, part: str) -> None:
        """Let go of an embedding, and of what is tied to it."""
        stored = self._tied.get(part, part)
        for name in (stored, *(name for name, origin in self._tied.items() if origin == stored)):
            assign(self._model, name, torch.empty_like(self._model.get_parameter(name), device="meta"))

    def forget(self) -> None:
        """Nothing of the model is in memory any more."""
        self._loaded = False
