"""What the recipes of every verb share: read from YAML under flags, checked as a whole, written out again.

A recipe is a pydantic model whose keys are the flags of its verb: defaults < recipe < flags and `key=value`. An unknown
key, a value of the wrong type and a request that contradicts itself are errors that name the file, the line and the way
out. What needs the model's shapes is checked by the verb's plan.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, PrivateAttr, ValidationError

from llmsparse.errors import CalibrationError, RecipeError
from llmsparse.runs import recipe_file, recipe_paths
from llmsparse.runs.layers import Layers
from llmsparse.storage.disk import parse_size
from llmsparse.text.shares import Sources, spell_sources, split_shares


def _device(value: Any) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", str(value)):
        raise ValueError(f"got {value!r}, wanted auto, cpu, cuda or cuda:0")
    return str(value)


def _shard_size(value: Any) -> str:
    try:
        parse_size(str(value))
    except RecipeError as error:
        raise ValueError(str(error).removeprefix("size: ")) from None
    return str(value)


def _no_bool(wanted: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"got {str(value).lower()}, wanted a {wanted}")
        return value

    return BeforeValidator(check)


def _path_text(value: Any) -> Any:
    if value == "":
        raise ValueError("got '', wanted a name or a path")
    return os.fspath(value) if isinstance(value, os.PathLike) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _texts(value: Any) -> Sources:
    """One text, or a list of several with weights; a list of one is that one."""
    given: list[Any] = list(value) if isinstance(value, list | tuple) else [value]  # pyright: ignore[reportUnknownArgumentType]
    texts = tuple(_path_text(text) for text in given)
    wrong = next((text for text in texts if not isinstance(text, str) or not text), None if texts else "")
    if wrong is not None:
        raise ValueError(
            f"got {value!r}, wanted a text such as c4 or notes.txt, or a list of them such as [c4@2, notes.txt]"
        )
    try:
        split_shares(texts)
    except CalibrationError as error:
        raise ValueError(str(error)) from None
    return texts[0] if len(texts) == 1 else texts


PathText = Annotated[str, BeforeValidator(_path_text)]  # a name or a path, from Python also a pathlib.Path
Source = PathText
Texts = Annotated[Sources, PlainValidator(_texts)]
Whole = Annotated[int, _no_bool("whole number"), Field(ge=0)]
Count = Annotated[int, _no_bool("whole number"), Field(ge=1)]
Length = Annotated[int, _no_bool("whole number"), Field(ge=2)]
Seed = Annotated[int, _no_bool("whole number"), Field(ge=0, lt=2**63)]
Number = Annotated[float, _no_bool("number"), Field(ge=0, allow_inf_nan=False)]
Device = Annotated[str, PlainValidator(_device)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ShardSize = Annotated[str, PlainValidator(_shard_size)]


class RunRecipe(BaseModel):
    """What a run needs, checked before a byte of the model is read. Raises RecipeError, in one line, for what cannot be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    single_file: ClassVar[bool] = False  # the result is one file, no folder
    verb: ClassVar[str] = ""  # the folder of its shipped recipes; those of `prune` stand above the others
    _notes: dict[str, str] = PrivateAttr(default_factory=dict[str, str])  # of the file that it was read from
    default_method: ClassVar[str] = ""  # that `method.option=value` means where no method is named

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise Layers(data).explain(error, type(self)) from error

    @classmethod
    def load(
        cls, recipe: str | Path | None = None, flags: Mapping[str, Any] | None = None, assignments: Sequence[str] = ()
    ) -> Self:
        """Read a recipe file or a shipped recipe by name, or neither, under `flags` (None: not given) and `key=value`s.

        Raises RecipeError that names file and line, flag, or assignment.
        """
        path = None if recipe is None else recipe_file.find(recipe, cls.verb)
        layers = Layers.layered(path, flags or {}, assignments, cls.default_method)
        made = layers.build(cls)
        made._notes = layers.notes
        return made

    @property
    def output_folder(self) -> Path:
        """Where the result goes: `output`, or a name made of the model's."""
        raise NotImplementedError

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked like a new one."""
        return type(self)(**{**self.model_dump(), **changes})

    def resolved(self) -> dict[str, Any]:
        """The mapping that `dump` writes: every default spelled out, what is not set left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def dump(self, comments: Mapping[str, Any] | None = None, folder: Path | None = None) -> str:
        """YAML that loads to an equal run, under `# key: value` comments; from `folder`, if it is written there."""
        keys = self.resolved()
        return recipe_file.write(keys if folder is None else recipe_paths.for_file(keys, folder), comments or {})

    def check_text(self, key: str, fingerprint: str) -> None:
        """RecipeError where the recipe file notes another `fingerprint` of the text that its `key` names."""
        noted = self._notes.get(f"{key} sha256")
        if noted is not None and noted != fingerprint:
            raise RecipeError(
                f"{key} {spell_sources(getattr(self, key))}: not the text of the run that wrote this recipe (sha256 of its windows "
                f"{fingerprint[:12]}…, noted {noted[:12]}…); give that text, or take the line `# {key} sha256` out"
            )


Kind = TypeVar("Kind", bound=RunRecipe)


def from_arguments(kind: type[Kind], recipe: Kind | str | Path | None, keys: Mapping[str, Any]) -> Kind:
    """The recipe of a call from Python: `run(PruneRecipe(…))`, `run("model", key=…)` or `run(model="model", key=…)`."""
    if isinstance(recipe, kind):
        if keys:
            raise RecipeError(
                f"got a {kind.__name__} and {', '.join(keys)} beside it; put these into the {kind.__name__}, or give "
                "keys alone"
            )
        return recipe
    if recipe is None:
        return kind(**keys)
    if not isinstance(recipe, str | os.PathLike):
        raise RecipeError(f"got {type(recipe).__name__} first, wanted a {kind.__name__}, or the model's name or folder")
    if "model" in keys:
        raise RecipeError(f"got two models, {str(recipe)!r} first and model={str(keys['model'])!r}; give one of them")
    return kind(model=recipe, **keys)


def refuse_both(resume: bool, overwrite: bool) -> None:
    """RecipeError if a run shall go on and start anew."""
    if resume and overwrite:
        raise RecipeError("--resume goes on with an unfinished run and --overwrite starts anew: choose one")
