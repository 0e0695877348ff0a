"""What a factorization needs, checked before a byte of the model is read: a sibling of `llmsparse.recipe`.

What needs the model's shapes (more experts than an FFN has groups of neurons, a container) is checked by the plan.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import PlainValidator, model_validator

from llmsparse.errors import OptionError, RecipeError
from llmsparse.runs.recipe import (
    Count,
    Device,
    Dtype,
    Length,
    PathText,
    RunRecipe,
    Seed,
    ShardSize,
    Source,
    Texts,
    Whole,
)
from llmsparse.text.bos import Bos
from llmsparse.text.shares import Sources


def parse_blocks(value: Any) -> str:
    """`none`, or whole numbers with commas, negative ones from the end: `0,-1`; a list will do. Returns the text."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    text = text.replace(" ", "")
    if text != "none" and not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise ValueError(f"got {value!r}, wanted none, or numbers of blocks such as 0,-1")
    return text


class FactorizeRecipe(RunRecipe):
    """A factorization. `keys.py` says what each key is for."""

    verb: ClassVar[str] = "factorize"

    model: Source
    output: PathText | None = None
    experts: Count = 16
    shared: Whole = 4
    active: Whole = 4
    split: Literal["clustered", "contiguous", "random"] = "clustered"
    router: Literal["linear", "gate-mean", "prior-approximate", "random"] = "linear"
    router_steps: Count = 300
    scale: Literal["fitted", "ratio", "none"] = "fitted"
    refit: bool = True
    container: Literal["auto", "glm4_moe", "mixtral", "qwen3_moe", "qwen2_moe"] = "auto"
    keep_dense: Annotated[str, PlainValidator(parse_blocks)] = "none"
    calibration: Texts = "auto"
    text_field: str | None = None
    bos: Bos | None = None
    calibration_samples: Count = 128
    seq_len: Length | None = None
    batch_size: Count | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    seed: Seed = 0
    max_shard_size: ShardSize = "5GB"
    revision: str | None = None

    @property
    def text_source(self) -> Sources:
        return self.calibration

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
        return self
