"""PruneRecipe: everything a pruning run needs, each key of it also a flag of `llmsparse prune`.

What needs the model's shapes (a rule that matches nothing, a width that 4 does not divide) is checked by the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator, model_validator

from llmsparse.errors import KeyPath, OptionError, RecipeError
from llmsparse.pruners import Pruner, Swaps
from llmsparse.pruners import spec as methods
from llmsparse.pruners.spec import MethodSpec
from llmsparse.pruning.allocation import ALLOCATIONS, Allocation, Uniform
from llmsparse.pruning.effort import EffortName
from llmsparse.runs.recipe import Count, Device, Dtype, Length, PathText, RunRecipe, Seed, ShardSize, Source, Texts
from llmsparse.runs.rules import check_rules, rule_for
from llmsparse.sparsity.fraction import parse_fraction
from llmsparse.sparsity.patterns import Pattern, parse_pattern
from llmsparse.text.bos import Bos
from llmsparse.text.shares import Sources

DEFAULT_METHOD = "sparsegpt"


def _match_steps(value: Any) -> int | Literal["auto"]:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    raise ValueError(f"got {value!r}, wanted auto, or a number of steps such as 300 (0 turns matching off)")


def _method(value: Any) -> MethodSpec:
    if isinstance(value, str) or (isinstance(value, dict) and "name" in value):
        return value  # pyright: ignore[reportUnknownVariableType]
    if is_dataclass(cast(object, value)):  # a pruner, from Python
        return methods.describe(cast("Pruner", value))
    raise ValueError(f"got {value!r}, wanted a name such as wanda, or a mapping such as {{name: wanda}}")


def _allocation(value: Any) -> MethodSpec:
    if isinstance(value, str) or (isinstance(value, dict) and "name" in value):
        return value  # pyright: ignore[reportUnknownVariableType]
    name = methods.name_in(ALLOCATIONS, value)
    if name is not None:  # one of the table, from Python
        return methods.described(name, value)
    raise ValueError(f"got {value!r}, wanted auto, a name such as owl, or a mapping such as {{name: owl}}")


def _bounds(value: Any) -> tuple[float, float] | None:
    """`0.5,0.8` or a list of two → (0.5, 0.8)."""
    if value is None:
        return None
    parts: list[Any] = list(value) if isinstance(value, list | tuple) else str(value).split(",")  # pyright: ignore[reportUnknownArgumentType]
    if len(parts) != 2:
        raise ValueError(f"got {value!r}, wanted the least and the largest sparsity, such as 0.5,0.8")
    low, high = (parse_fraction(part) for part in parts)
    if low > high:
        raise ValueError(f"got {value!r}, wanted the least sparsity first, such as 0.5,0.8")
    return low, high


def _name(method: MethodSpec) -> str:
    return method if isinstance(method, str) else str(method["name"])


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Sparsity = Annotated[float, PlainValidator(parse_fraction)]
Globs = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
Method = Annotated[MethodSpec, PlainValidator(_method)]
Allocating = Annotated[MethodSpec, PlainValidator(_allocation)]


class Rule(BaseModel):
    """Other settings for the weights whose on-disk name (without `.weight`) matches a glob.

    The last rule that matches a weight counts, alone: what it leaves out comes from the recipe's own keys, never from
    an earlier rule that matches too. A pattern N:M brings its own sparsity.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str
    sparsity: Sparsity | None = None
    pattern: str | None = None
    method: Method | None = None

    @cached_property
    def pruner(self) -> Pruner | None:
        """The rule's method, if it names one."""
        return None if self.method is None else methods.build(self.method)


class PruneRecipe(RunRecipe):
    """A pruning run. `recipe_keys.py` says what each key is for."""

    default_method: ClassVar[str] = DEFAULT_METHOD

    model: Source
    output: PathText | None = None
    effort: EffortName = "default"
    method: Method = DEFAULT_METHOD
    sparsity: Sparsity | None = None
    pattern: str = "unstructured"
    scope: Literal["auto", "row", "matrix"] = "auto"
    refine: Literal["auto", "none", "swaps", "fading"] = "auto"
    permute: Literal["auto", "off"] | None = None
    allocation: Allocating = "auto"
    allocation_level: Literal["block", "projection", "weight"] = "block"
    allocation_bounds: Annotated[Sequence[float] | None, PlainValidator(_bounds)] = None
    rules: tuple[Rule, ...] = ()
    only: Globs = ()
    include: Globs = ()
    exclude: Globs = ()
    keep_zeros: bool = False
    text_only: bool = False
    true_sequential: bool = False
    match_steps: Annotated[int | Literal["auto"], PlainValidator(_match_steps)] = "auto"
    calibration: Texts = "auto"
    text_field: str | None = None
    bos: Bos | None = None
    calibration_samples: Count = 128
    seq_len: Length | None = None
    batch_size: Count | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    seed: Seed = 0
    format: Literal["dense", "packed"] = "dense"
    values: Literal["bf16", "int8", "int4"] | None = None
    max_shard_size: ShardSize = "5GB"
    revision: str | None = None
    trust_remote_code: bool = False

    def resolved(self) -> dict[str, Any]:
        """The mapping that `dump` writes: every default and method option spelled out, what is not set left out."""
        data = {key: value for key, value in self.model_dump(mode="json", exclude_none=True).items() if value != []}
        name = methods.name_in(ALLOCATIONS, self.allocator)
        assert name is not None
        allocation = methods.described(name, self.allocator) if len(fields(cast(Any, self.allocator))) else name
        return data | {"method": methods.describe(self.pruner), "allocation": allocation}

    @cached_property
    def pruner(self) -> Pruner:
        """The method with its options, rules aside."""
        return self._refined(methods.build(self.method))

    def _refined(self, pruner: Pruner) -> Pruner:
        """A method followed by swaps where the recipe says so, and it does not end in them anyway."""
        return Swaps(pruner) if self.refine == "swaps" and not isinstance(pruner, Swaps) else pruner

    @cached_property
    def allocator(self) -> Allocation:
        """How the zeros are shared out; for `auto` all units get the same, unless the plan knows better."""
        if self.allocation != "auto":
            return methods.build_from(ALLOCATIONS, "allocation", self.allocation, ("allocation",))
        return Uniform()

    @property
    def beside_dense(self) -> bool:
        """The pattern is N:M, and `sparsity` says how much of the model gets it, the rest staying dense."""
        return ":" in self.pattern and self.sparsity is not None and not isinstance(self.allocator, Uniform)

    @property
    def method_name(self) -> str:
        return _name(self.method)

    @property
    def text_source(self) -> Sources:
        return self.calibration

    @property
    def output_folder(self) -> Path:
        """`output`, or `./<name>-<method>-<percent>` (`-2of4` for N:M; `-packed` behind it for that format)."""
        if self.output is not None:
            return Path(self.output)
        name = Path(self.model).name or Path(self.model).resolve().name
        name = Path(self.model).resolve().name if name == ".." else name
        how_much = (
            self.pattern.replace(":", "of")
            if self.sparsity is None or ":" in self.pattern
            else f"{100 * self.sparsity:.4g}"
        )
        return Path(f"{name}-{self.method_name}-{how_much}{'-packed' if self.format == 'packed' else ''}{self._coded}")

    @property
    def _coded(self) -> str:
        return f"-{self.values}" if self.values not in (None, "bf16") else ""

    def rule_for(self, name: str) -> Rule | None:
        """The last rule that matches a weight; what it leaves out comes from the recipe's own keys."""
        return rule_for(self.rules, name)

    def pruner_for(self, name: str) -> Pruner:
        rule = self.rule_for(name)
        return self._refined(rule.pruner) if rule and rule.pruner is not None else self.pruner

    def method_for(self, name: str) -> str:
        rule = self.rule_for(name)
        return _name(rule.method) if rule and rule.method is not None else self.method_name

    def pattern_for(self, name: str) -> Pattern:
        return self._pattern(self.rule_for(name))

    def rules_sparsity_of(self, name: str) -> bool:
        """Whether a rule gives a weight a sparsity or a pattern of its own."""
        rule = self.rule_for(name)
        return rule is not None and (rule.sparsity is not None or rule.pattern is not None)

    def check_rules(self, names: Iterable[str]) -> None:
        """RecipeError for a rule whose glob matches none of the weights `names`."""
        check_rules(self.rules, names)

    def _pattern(self, rule: Rule | None) -> Pattern:
        text, sparsity, pruner = self.pattern, None if self.beside_dense else self.sparsity, self.pruner
        if rule is not None:
            if rule.pattern is not None:
                text = rule.pattern
                sparsity = None if ":" in text else sparsity  # an N:M of its own brings its sparsity
            sparsity = sparsity if rule.sparsity is None else rule.sparsity
            pruner = rule.pruner or pruner
        return parse_pattern(text, sparsity, pruner.scope if self.scope == "auto" else self.scope)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.sparsity is None and self.pattern == "unstructured":
            raise ValueError("nothing says how much to prune: give --sparsity 0.5, or a pattern such as --pattern 2:4")
        if self.values is not None and self.format != "packed":
            raise OptionError(
                ("values",), f"{self.values} is how a packed folder stores values; give --format packed, too"
            )
        methods.build(self.method)
        _ = self.allocator
        if self.refine == "fading" and self.match_steps == 0:
            raise OptionError(
                ("refine",), "weights fade while blocks are matched, and match_steps is 0: give it 200, or auto"
            )
        _try(("sparsity" if self.pattern == "unstructured" else "pattern",), lambda: self._pattern(None))
        most = self._pattern(None).sparsity
        if self.beside_dense and not 0 < cast(float, self.sparsity) < most:
            raise OptionError(
                ("sparsity",),
                f"{self.sparsity:g} of pattern {self.pattern} beside dense weights: wanted more than 0 and less than {most:g}",
            )
        for index, rule in enumerate(self.rules):
            at = ("rules", index)
            if rule.sparsity is None and rule.pattern is None and rule.method is None:
                raise OptionError(at, "says nothing but match; give it a sparsity, a pattern or a method")
            if rule.method is not None:
                methods.build(rule.method, (*at, "method"))
            _try((*at, "pattern" if rule.pattern is not None else "sparsity"), lambda rule=rule: self._pattern(rule))
        return self


def _try(at: KeyPath, check: Callable[[], object]) -> None:
    """Run a check of another module; its complaint is about the key at `at`."""
    try:
        check()
    except RecipeError as error:
        raise OptionError(at, str(error)) from None
