"""What cutting a model's activations needs, checked before a byte of the model is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, PlainValidator, model_validator

from llmsparse.runs.recipe import Count, Device, Dtype, Length, PathText, RunRecipe, Seed, ShardSize, Source, Texts
from llmsparse.sparsity.fraction import parse_fraction
from llmsparse.text.bos import Bos
from llmsparse.text.shares import Sources


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _share(value: Any) -> float:
    return parse_fraction(value, "share of inputs to leave out")


Globs = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]


class ActivationsRecipe(RunRecipe):
    """Which inputs are left out. `keys.py` says what each key is for."""

    verb: ClassVar[str] = "activations"

    model: Source
    output: PathText | None = None
    sparsity: Annotated[float, PlainValidator(_share)] | None = None
    score: Literal["wina", "teal"] = "wina"
    rule: Literal["threshold", "topk"] = "threshold"
    allocation: Literal["greedy", "uniform"] = "greedy"
    bias: Literal["centre", "fold", "none"] = "centre"
    only: Globs = ()
    exclude: Globs = ()
    calibration: Texts = "auto"
    text_field: str | None = None
    bos: Bos | None = None
    calibration_samples: Count = 32
    seq_len: Length | None = None
    batch_size: Count | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    seed: Seed = 0
    max_shard_size: ShardSize = "5GB"
    revision: str | None = None
    trust_remote_code: bool = False

    def resolved(self) -> dict[str, Any]:
        return {key: value for key, value in super().resolved().items() if value != []}

    @property
    def text_source(self) -> Sources:
        return self.calibration

    @property
    def share(self) -> float:
        """`sparsity`, which is there."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def output_folder(self) -> Path:
        """`output`, or `./<name>-activations-<percent>`."""
        if self.output is not None:
            return Path(self.output)
        name = Path(self.model).resolve().name if Path(self.model).exists() else Path(self.model).name
        return Path(f"{name}-activations-{100 * self.share:.4g}")

    @model_validator(mode="after")
    def _says_how_much(self) -> Self:
        if self.sparsity is None:
            raise ValueError("nothing says how many inputs to leave out: give --sparsity 0.5")
        return self
