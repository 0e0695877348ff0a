"""What shrinking a model needs, checked before a byte of the model is read.

What needs the model's shapes (more experts than there are, heads that do not divide) is refused by the reduction itself.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, PlainValidator, model_validator

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

REDUCTIONS = ("experts", "blocks", "ffn", "heads")
EXPERT_SCORES = ("hope", "reap", "man", "mass", "frequency", "random")  # the first of each is the default
BLOCK_SCORES = ("suffix", "influence")
ExpertScore = Literal["hope", "reap", "man", "mass", "frequency", "random"]
BlockScore = Literal["suffix", "influence"]


def parse_amount(value: Any) -> str:
    """How much stays: "96", a number of things, or "75%" of them; 0.75 is 75%. ValueError for anything else."""
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"\d+|(\d+\.?\d*|\.\d+)%|0?\.\d+", text):
        raise ValueError(f"got {value!r}, wanted how much stays: a share such as 75%, or a number such as 96")
    if re.fullmatch(r"\d+", text):
        if int(text) == 0:
            raise ValueError("got 0, wanted at least 1: something has to stay")
        return str(int(text))
    share = Decimal(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < share < 1:
        raise ValueError(
            f"got {text}, wanted a share above 0% and below 100%: something has to stay, and something to go"
        )
    return f"{(100 * share).normalize():f}%"


def amount_of(amount: str, total: int, step: int = 1) -> int:
    """How many of `total` an amount such as "96" or "75%" is; a share to the nearest multiple of `step`, at least one."""
    if not amount.endswith("%"):
        return int(amount)
    exact = Decimal(amount.removesuffix("%")) * total / 100
    return max(1, int(exact / step + Decimal("0.5"))) * step


def _scores(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


Amount = Annotated[str, PlainValidator(parse_amount)]


class ShrinkRecipe(RunRecipe):
    """A model to be made smaller. `keys.py` says what each key is for."""

    verb: ClassVar[str] = "shrink"

    model: Source
    output: PathText | None = None
    experts: Amount | None = None
    blocks: Amount | None = None
    ffn: Amount | None = None
    heads: Amount | None = None
    score: Annotated[tuple[ExpertScore | BlockScore, ...], BeforeValidator(_scores)] = ()
    scores: PathText | None = None
    blend: Annotated[tuple[str, ...], BeforeValidator(_scores)] = ()
    one_pass: bool = False
    refit: bool = True
    match_steps: Whole = 0
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
    trust_remote_code: bool = False

    @property
    def text_source(self) -> Sources:
        return self.calibration

    @property
    def expert_score(self) -> str:
        return next((name for name in self.score if name in EXPERT_SCORES), EXPERT_SCORES[0])

    @property
    def block_score(self) -> str:
        return next((name for name in self.score if name in BLOCK_SCORES), BLOCK_SCORES[0])

    @property
    def amounts(self) -> dict[str, str]:
        """What is asked to become fewer → how much of it stays."""
        return {name: amount for name in REDUCTIONS if (amount := getattr(self, name)) is not None}

    @property
    def output_folder(self) -> Path:
        """`output`, or `./<name>-experts-75`: what is shrunk, and to how much."""
        if self.output is not None:
            return Path(self.output)
        name = Path(self.model).resolve().name if Path(self.model).exists() else Path(self.model).name
        return Path("-".join([name, *(f"{what}-{amount.removesuffix('%')}" for what, amount in self.amounts.items())]))

    def resolved(self) -> dict[str, Any]:
        return {key: value for key, value in super().resolved().items() if value != []}

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if not self.amounts:
            raise ValueError("nothing says what to shrink: give --experts 75%, --blocks 24, --ffn 75% or --heads 75%")
        for what, known in (("experts", EXPERT_SCORES), ("blocks", BLOCK_SCORES)):
            named = [name for name in self.score if name in known]
            if named and what not in self.amounts:
                raise OptionError(
                    ("score",), f"{named[0]} chooses {what}, which are not shrunk; add --{what}, or leave it out"
                )
            if len(named) > 1:
                raise OptionError(("score",), f"got {' and '.join(named)}, wanted one way to choose {what}")
        for key in ("scores", "one_pass"):
            if getattr(self, key) and "experts" not in self.amounts:
                flag = f"--{key.replace('_', '-')}"
                raise OptionError((key,), f"is about experts, which are not shrunk; add --experts, or leave out {flag}")
        if self.scores is not None and self.one_pass:
            raise OptionError(
                ("one_pass",), "says how experts are measured, and --scores brings what was; leave one out"
            )
        if self.blend and self.scores is None:
            raise OptionError(
                ("blend",), "blends texts of --scores, which is not given; weights of --calibration go behind an @"
            )
        return self


def refuse_amount(what: str, amount: str, kept: int, total: int) -> None:
    """RecipeError where `kept` of `total` is more than there is, or all of it."""
    if kept > total:
        raise RecipeError(f"--{what} {amount}: there are {total}; ask for fewer")
    if kept == total:
        raise RecipeError(f"--{what} {amount}: that is all {total}, nothing would go; ask for fewer")
