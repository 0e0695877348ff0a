"""What an encoding is: which tensors on disk are one weight together, and what that weight is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmsparse.storage.shard import TensorSpec

Specs = Mapping[str, TensorSpec]  # of the tensors on disk, by name


@dataclass(frozen=True)
class Encoded:
    """A weight that several tensors on disk hold."""

    shape: tuple[int, ...]  # of the weight
    parts: Mapping[str, str]  # what decoding calls a part → the tensor on disk that it is
    decode: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]  # parts, by their names → the weight in that dtype


@dataclass(frozen=True)
class Found:
    """What an encoding makes of a checkpoint."""

    weights: dict[str, Encoded] = field(
        default_factory=dict[str, Encoded]
    )  # by the name that the weight has when dense
    dropped: set[str] = field(default_factory=set[str])  # tensors that only the encoded model has a use for


Finder = Callable[[Specs, Mapping[str, Any]], Found]
"""From the tensors on disk and the config's `quantization_config` to the weights they hold. CheckpointError where a
weight is encoded in a way that is not known, or lacks a part."""
