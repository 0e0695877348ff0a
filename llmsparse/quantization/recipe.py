"""What a quantization needs, checked before a byte of the model is read.

What needs the model's shapes (a group that does not divide, bits that no code reaches) is checked by the plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from llmsparse.errors import OptionError
from llmsparse.runs.recipe import (
    Count,
    Device,
    Dtype,
    Length,
    Number,
    PathText,
    RunRecipe,
    Seed,
    ShardSize,
    Source,
    Texts,
)
from llmsparse.text.bos import Bos
from llmsparse.text.shares import Sources

MOST_BITS = 8


def _bits(value: Any) -> float:
    try:
        bits = float(str(value))
    except ValueError:
        bits = 0.0
    if isinstance(value, bool) or not 0 < bits <= MOST_BITS:
        raise ValueError(
            f"got {value!r}, wanted a number of bits a weight, above 0 and at most {MOST_BITS}, such as 2.5"
        )
    return bits


def _group(value: Any) -> int | Literal["row", "matrix"]:
    if value in ("row", "matrix"):
        return value
    if not isinstance(value, bool) and str(value).isdecimal() and int(str(value)) > 0:
        return int(str(value))
    raise ValueError(f"got {value!r}, wanted row, matrix, or how many columns share a step, such as 128")


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Globs = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
Bits = Annotated[float, PlainValidator(_bits)]
Group = Annotated[int | Literal["row", "matrix"], PlainValidator(_group)]
Method = Literal["gptq", "nearest"]


class Rule(BaseModel):
    """Other settings for the weights whose on-disk name (without `.weight`) matches a glob; `runs/rules.py` says which counts.

    Bits of a rule are those of its weights alone: the others still take as many as the recipe asks for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str
    bits: Bits | None = None
    group: Group | None = None
    method: Method | None = None


class QuantizeRecipe(RunRecipe):
    """A quantization. `keys.py` says what each key is for."""

    verb: ClassVar[str] = "quantize"

    model: Source
    output: PathText | None = None
    bits: Bits | None = None
    values: Literal["int8", "int4"] | None = None
    method: Method = "gptq"
    group: Group = "row"
    rules: tuple[Rule, ...] = ()
    rate: Number = 0.1
    damp: Annotated[Number, Field(gt=0, le=1)] = 0.01  # more is no damping any more: rounding to the nearest
    head_bits: Annotated[int, Field(ge=4, le=8)] | None = None
    match_steps: Annotated[int, Field(ge=0)] = 0
    only: Globs = ()
    include: Globs = ()
    exclude: Globs = ()
    calibration: Texts = "c4"
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
    trust_remote_code: bool = False

    def resolved(self) -> dict[str, Any]:
        return {key: value for key, value in super().resolved().items() if value != []}

    @property
    def text_source(self) -> Sources:
        return self.calibration

    @property
    def output_folder(self) -> Path:
        """`output`, or `./<name>-<bits>bits`, or `-int8` for values under a mask."""
        if self.output is not None:
            return Path(self.output)
        name = Path(self.model).resolve().name if Path(self.model).exists() else Path(self.model).name
        return Path(f"{name}-{self.values or f'{self.bits:g}bits'}")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.bits is None and self.values is None:
            raise ValueError("nothing says how few bits: give --bits 2.5, or for a sparse model --values int8")
        if self.bits is not None and self.values is not None:
            raise OptionError(("values",), f"{self.values} and --bits {self.bits:g} both say how many bits: give one")
        if self.values is not None and "matrix" in (self.group, *(rule.group for rule in self.rules)):
            raise OptionError(
                ("group",), f"matrix beside values {self.values}, whose steps are a row's; give row or columns"
            )
        for index, rule in enumerate(self.rules):
            if rule.bits is None and rule.group is None and rule.method is None:
                raise OptionError(("rules", index), "says nothing but match; give it bits, a group or a method")
            if rule.bits is not None and self.values is not None:
                raise OptionError(
                    ("rules", index, "bits"), f"{rule.bits:g} beside values {self.values}, which says how many bits"
                )
        return self
