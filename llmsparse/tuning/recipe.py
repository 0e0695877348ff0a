"""What a tuning needs, checked before a byte of the model is read: the sibling of `llmsparse.recipe`.

What needs the two models (a teacher of another shape, a folder that holds no mixture) is checked by the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llmsparse import recipe_file
from llmsparse.errors import RecipeError
from llmsparse.method import OptionError
from llmsparse.recipe import Count, Device, Length, PathText, Seed
from llmsparse.recipe_origins import Origins

KIND = "tune"  # the folder of its shipped recipes
RATES = {"experts": 1e-3, "lora": 2e-3, "router": 1e-3}  # docs/LOG.md has the sweep


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"got {str(value).lower()}, wanted a number")
    return value


Number = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1, allow_inf_nan=False)]
Steps = Annotated[int, BeforeValidator(_number), Field(ge=0)]


class TuneRecipe(BaseModel):
    """A tuning. Raises RecipeError, in one line, for whatever cannot be. `keys.py` says what each key is for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[PathText, Field(min_length=1)]
    teacher: PathText = ""
    output: PathText | None = None
    train: Literal["router", "experts", "lora"] = "experts"
    steps: Count = 500
    learning_rate: Rate | None = None
    router_learning_rate: Rate = 1e-3
    warmup: Steps = 20
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
    seq_len: Length | None = None
    batch_size: Count | None = None
    seed: Seed = 0
    device: Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    save_every: Count = 50
    max_shard_size: Annotated[str, BeforeValidator(str)] = "5GB"

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise Origins(data).explain(error, type(self)) from error

    @classmethod
    def load(
        cls, recipe: str | Path | None = None, flags: Mapping[str, Any] | None = None, assignments: Sequence[str] = ()
    ) -> Self:
        """Read a recipe file or a shipped recipe by name, or neither, under `flags` (None: not given) and `key=value`s.

        Raises RecipeError that names file and line, flag, or assignment.
        """
        path = None if recipe is None else recipe_file.find(recipe, KIND)
        return Origins.layered(path, flags or {}, assignments).build(cls)

    def resolved(self) -> dict[str, Any]:
        """The mapping that `dump` writes: every default spelled out, what is not set left out."""
        return self.model_dump(mode="json", exclude_none=True) | {"learning_rate": self.rate}

    def dump(self, comments: Mapping[str, Any] | None = None) -> str:
        """YAML that loads to an equal run, under `# key: value` comments."""
        return recipe_file.write(self.resolved(), comments or {})

    @property
    def rate(self) -> float:
        """`learning_rate`, or what suits the weights that are trained."""
        return RATES[self.train] if self.learning_rate is None else self.learning_rate

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
    def output_folder(self) -> Path:
        """`output`, or `./<name>-tuned`."""
        return Path(self.output) if self.output is not None else Path(f"{Path(self.model).resolve().name}-tuned")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        from llmsparse.checkpoint import parse_size

        if not self.teacher:
            raise OptionError(("teacher",), "missing; name the dense model that this one was made from")
        if not self.text:
            raise OptionError(("text",), "missing; give --text wikitext2, --text builtin or --text FILE")
        if not any(self.weights.values()):
            raise ValueError("every weight of the loss is 0, so there is nothing to minimise")
        try:
            parse_size(self.max_shard_size)
        except RecipeError as error:
            raise OptionError(("max_shard_size",), str(error)) from None
        return self
