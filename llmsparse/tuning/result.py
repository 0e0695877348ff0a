"""What training leaves behind: the trained weights in the dtype that they had on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.runs.run import Made
from llmsparse.tuning.plan import TunePlan
from llmsparse.tuning.trainable import Trainable

TUNED = "tuned weights"  # journal entry


@dataclass(frozen=True)
class Tuned:
    """The journal's record of the trained weights: their number."""

    tensors: int

    def to_json(self) -> dict[str, Any]:
        return {"tensors": self.tensors}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Self:
        return cls(entry["tensors"])


def tuned(plan: TunePlan, trainable: Trainable) -> Made[Tuned]:
    """Every tensor that training may change, as it will be stored; NumericalError where one overflows its dtype."""
    values = plan.model.naming.to_disk({name: value.cpu() for name, value in trainable.values().items()})
    rounded = {key: _stored(value, plan.reader.spec(key).dtype) for key, value in values.items()}
    with plan.ranks.together():
        for key, value in rounded.items():
            if not torch.isfinite(value).all():
                raise NumericalError(f"{key} became NaN or Inf in {value.dtype}; lower --learning-rate")
    rest = plan.reader.read(key for key in plan.trained if key not in rounded)
    return Made(rest | rounded, Tuned(len(rounded)))


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded, and without -0.0."""
    rounded = value.to(dtype)
    return rounded.masked_fill(rounded == 0, 0.0).contiguous()
