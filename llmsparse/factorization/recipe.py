"""What a factorization needs, checked before a byte of the model is read: the sibling of `llmsparse.recipe`.

What needs the model's shapes (more experts than an FFN has groups of neurons, a container) is checked by the plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from llmsparse import recipe_file
from llmsparse.errors import RecipeError
from llmsparse.method import OptionError
from llmsparse.recipe import Count, Device, Dtype, Length, PathText, Seed
from llmsparse.recipe_origins import Origins

KIND = "factorize"  # the folder of its shipped recipes


def parse_blocks(value: Any) -> str:
    """`none`, or whole numbers with commas, negative ones from the end: `0,-1`; a list will do. Returns the text."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    text = text.replace(" ", "")
    if text != "none" and not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise ValueError(f"got {value!r}, wanted none, or numbers of blocks such as 0,-1")
    return text


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"got {str(value).lower()}, wanted a whole number")
    return value


Slots = Annotated[int, BeforeValidator(_whole), Field(ge=0)]


class FactorRecipe(BaseModel):
    """A factorization. Raises RecipeError, in one line, for whatever cannot be. `keys.py` says what each key is for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[PathText, Field(min_length=1)]
    output: PathText | None = None
    experts: Count = 16
    shared: Slots = 4
    active: Slots = 4
    split: Literal["clustered", "contiguous", "random"] = "clustered"
    router: Literal["linear", "gate-mean", "prior-approximate", "random"] = "linear"
    router_steps: Count = 300
    scale: Literal["fitted", "ratio", "none"] = "fitted"
    refit: bool = True
    container: Literal["auto", "glm4_moe", "mixtral", "qwen3_moe", "qwen2_moe"] = "auto"
    keep_dense: Annotated[str, PlainValidator(parse_blocks)] = "none"
    calibration: Annotated[PathText, Field(min_length=1)] = "c4"
    text_field: str | None = None
    calibration_samples: Count = 128
    seq_len: Length | None = None
    batch_size: Count | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    seed: Seed = 0
    max_shard_size: Annotated[str, BeforeValidator(str)] = "5GB"
    revision: str | None = None

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

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked like a new one."""
        return type(self)(**{**self.model_dump(), **changes})

    def resolved(self) -> dict[str, Any]:
        """The mapping that `dump` writes: every default spelled out, what is not set left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def dump(self, comments: Mapping[str, Any] | None = None) -> str:
        """YAML that loads to an equal run, under `# key: value` comments."""
        return recipe_file.write(self.resolved(), comments or {})

    @property
    def output_folder(self) -> Path:
        """`output`, or `./<name>-factorize-<percent of the experts that run>`."""
        if self.output is not None:
            return Path(self.output)
        name = Path(self.model).resolve().name if Path(self.model).exists() else Path(self.model).name
        return Path(f"{name}-factorize-{100 * (self.shared + self.active) / self.experts:.0f}")

    def kept(self, blocks: int) -> list[int]:
        """The numbers of the blocks that stay dense, of a model of so many. RecipeError for one it lacks."""
        if self.keep_dense == "none":
            return []
        numbers = [int(number) for number in self.keep_dense.split(",")]
        for number in numbers:
            if not -blocks <= number < blocks:
                raise RecipeError(f"--keep-dense {self.keep_dense}: there is no block {number}, the model has {blocks}")
        kept = sorted({number % blocks for number in numbers})
        if len(kept) == blocks:
            raise RecipeError(f"--keep-dense {self.keep_dense}: these are all {blocks} blocks, nothing is factorized")
        return kept

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        from llmsparse.checkpoint import parse_size

        if self.active < 1:
            raise OptionError(("active",), "got 0, wanted at least 1 routed expert to run for a token")
        if self.shared + self.active > self.experts:
            most = self.experts - self.active
            way_out = f"--shared {most} or less" if most >= 0 else f"--active {self.experts} or less"
            raise OptionError(
                ("experts",),
                f"{self.shared} shared and {self.active} active make {self.shared + self.active}, "
                f"more than {self.experts} experts; use {way_out}, or more --experts",
            )
        try:
            parse_size(self.max_shard_size)
        except RecipeError as error:
            raise OptionError(("max_shard_size",), str(error)) from None
        return self
