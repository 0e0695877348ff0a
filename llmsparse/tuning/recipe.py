"""What a tuning needs, checked before a byte of the model is read: a sibling of `llmsparse.recipe`.

What needs the two models (a teacher of another shape, a folder that holds no mixture) is checked by the plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmsparse.errors import OptionError
from llmsparse.runs.recipe import (
    Count,
    Device,
    Length,
    Number,
    PathText,
    RunRecipe,
    Seed,
    ShardSize,
    Source,
    Whole,
)
from llmsparse.text.bos import Bos

RATES = {"experts": 1e-3, "lora": 2e-3}  # by what is trained beside the routers

Rate = Annotated[Number, Field(gt=0, lt=1)]


class TuneRecipe(RunRecipe):
    """A tuning. `keys.py` says what each key is for."""

    verb: ClassVar[str] = "tune"

    model: Source
    teacher: PathText = ""
    output: PathText | None = None
    train: Literal["router", "experts", "lora"] = "experts"
    steps: Count = 500
    learning_rate: Rate | None = None
    router_learning_rate: Rate = 1e-3
    warmup: Whole = 20
    final_rate: Annotated[Number, Field(le=1)] = 0.05
    weight_decay: Number = 0.0
    lora_rank: Count = 16
    kl_weight: Number = 1.0
    layer_weight: Number = 0.1
    router_weight: Number = 0.05
    router_loss: Literal["greedy", "norm", "prior-approximate"] = "greedy"
    balance_weight: Number = 0.01
    language_weight: Number = 0.0
    text: PathText = ""
    text_field: str | None = None
    bos: Bos | None = None
    seq_len: Length | None = None
    batch_size: Count | None = None
    seed: Seed = 0
    device: Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    revision: str | None = None
    teacher_revision: str | None = None
    trust_remote_code: bool = False
    save_every: Count = 50
    max_shard_size: ShardSize = "5GB"

    def resolved(self) -> dict[str, Any]:
        recipe = super().resolved() | ({} if self.train == "router" else {"learning_rate": self.rate})
        if not self.trust_remote_code:
            del recipe["trust_remote_code"]
        return recipe

    @property
    def rate(self) -> float:
        """`learning_rate`, or what suits the weights that are trained."""
        return RATES.get(self.train, self.router_learning_rate) if self.learning_rate is None else self.learning_rate

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        return {
            "kl": self.kl_weight,
            "layer": self.layer_weight,
            "router": self.router_weight,
            "balance": self.balance_weight,
            "language": self.language_weight,
        }

    @property
    def text_source(self) -> str:
        return self.text

    @property
    def output_folder(self) -> Path:
        """`output`, or `./<name>-tuned`."""
        return Path(self.output) if self.output is not None else Path(f"{Path(self.model).resolve().name}-tuned")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if not self.teacher:
            raise OptionError(("teacher",), "missing; name the dense model that this one was made from")
        if not self.text:
            raise OptionError(("text",), "missing; give --text wikitext2, --text builtin or --text FILE")
        if self.train == "router" and self.learning_rate is not None:
            raise OptionError(("learning_rate",), "no experts are trained; use --router-learning-rate")
        if not any(self.weights.values()):
            raise ValueError("every weight of the loss is 0, so there is nothing to minimise")
        return self
