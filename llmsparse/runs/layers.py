"""Where each value of a recipe came from, and errors that say so.

Values are layered: recipe file, then flags, then `key=value`. What stands last counts, and a mistake is reported with
the place that it was read from: `my.yaml:3`, `--sparsity`, or `method.damp=abc`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from pydantic import BaseModel, ValidationError

from llmsparse.errors import KeyPath, OptionError, RecipeError, did_you_mean
from llmsparse.runs import recipe_file, recipe_paths

Kind = TypeVar("Kind", bound=BaseModel)

DECIDES_TEXT = (  # keys without which what a file notes of its text no longer holds
    "model", "calibration", "text", "text_field", "bos", "calibration_samples", "seq_len", "seed", "revision", "steps", "batch_size"
)  # fmt: skip


@dataclass
class Layers:
    """`data` as merged so far, and the place each key of it was read from."""

    data: dict[str, Any] = field(default_factory=dict[str, Any])
    places: dict[KeyPath, str] = field(default_factory=dict[KeyPath, str])
    notes: dict[str, str] = field(default_factory=dict[str, str])  # what the run that wrote the file said beside it

    @classmethod
    def layered(
        cls, file: Path | None, flags: Mapping[str, Any], assignments: Sequence[str], default_method: str = ""
    ) -> Self:
        """A recipe file if there is one, under flags, under `key=value`s."""
        layers = cls()
        if file is not None:
            layers.add_file(file)
        layers.add_flags(flags)
        for assignment in assignments:
            layers.add_assignment(assignment, default_method)
        return layers

    def build(self, kind: type[Kind]) -> Kind:
        """The recipe of this kind. RecipeError that names file and line, flag, or assignment."""
        try:
            return kind(**self.data)
        except RecipeError as error:
            if isinstance(error.__cause__, ValidationError):  # said again, now with file and line
                raise self.explain(error.__cause__, kind) from None
            raise

    def add_file(self, path: Path) -> None:
        data, lines = recipe_file.read(path)
        self.data, self.notes = recipe_paths.from_file(data, path), recipe_file.notes(path)
        self.places = {at: f"{path}:{line}" for at, line in lines.items() if at}

    def add_flags(self, flags: Mapping[str, Any]) -> None:
        """Flags that were given; None is a flag that was not."""
        for key, value in flags.items():
            if value is not None:
                self._set((key,), value, "MODEL" if key == "model" else f"--{key.replace('_', '-')}")

    def add_assignment(self, assignment: str, default_method: str) -> None:
        """`key=value`, the key dotted: `method.damp=0.1`, `rules.0.sparsity=0.5`."""
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise RecipeError(
                f"got {assignment!r}, wanted key=value such as method.damp=0.1; the output folder goes with -o"
            )
        first, *inner = key.replace("-", "_").split(".")
        at = (first, *(int(part) if part.isdecimal() else part for part in inner))
        if at[0] == "method" and len(at) > 1:  # options of a method given by name only, or not at all
            spec = self.data.get("method", default_method)
            self.data["method"] = {"name": spec} if isinstance(spec, str) else spec
        self._set(at, recipe_file.parse_value(text), assignment)

    def _set(self, at: KeyPath, value: Any, place: str) -> None:
        target: Any = self.data
        for step, part in enumerate(at[:-1]):
            target = _inside(target, part, at[:step], place)
        if isinstance(target, list) and not _has(target, at[-1]):
            raise RecipeError(f"{place}: {spell(at[:-1])} holds no {at[-1]!r}")
        if not isinstance(target, dict | list):
            hint = f"; write {spell(at[:-1])}={{name: {target}}} first" if at[0] == "method" else ""
            raise RecipeError(f"{place}: {spell(at[:-1])} is {target!r}, which has no keys{hint}")
        cast(Any, target)[at[-1]] = value
        self.places = {known: where for known, where in self.places.items() if known[: len(at)] != at}
        self.places[at] = place
        if at[0] in DECIDES_TEXT:
            self.notes = {}

    def place(self, at: KeyPath) -> str | None:
        """The closest place known for `at`: its own, or that of what it is part of."""
        return next((self.places[at[:n]] for n in range(len(at), 0, -1) if at[:n] in self.places), None)

    def located(self, at: KeyPath, message: str) -> str:
        """`message` behind the place of `at`, and behind its key where the place is not already its name."""
        place = self.place(at)
        if place is None:
            return f"{spell(at)}: {message}" if at else message
        if place.startswith("--") or "=" in place or message.startswith(f"{at[-1]} "):
            return f"{place}: {message}"
        return f"{place}: {spell(at)}: {message}"

    def explain(self, error: ValidationError, model: type[BaseModel]) -> RecipeError:
        """The first of pydantic's complaints as one line."""
        first = error.errors()[0]
        at: KeyPath = first["loc"]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, OptionError):
            return RecipeError(self.located((*at, *cause.path), str(cause)))
        if first["type"] == "value_error":
            return RecipeError(self.located(at, str(cause)))
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(str(at[-1]), _keys(model, at))
            place = self.place(at)
            return RecipeError(f"{place + ': ' if place else ''}unknown key {spell(at)!r}{hint}")
        if first["type"] == "missing":
            hint = "; name a folder, a hub id or builtin, or a recipe that does" if at == ("model",) else ""
            return RecipeError(self.located(at[:-1], f"{at[-1]} is missing{hint}"))
        return RecipeError(self.located(at, f"got {first['input']!r}, wanted {_wanted(first)}"))


def _has(target: Any, part: str | int) -> bool:
    return isinstance(part, int) and part < len(target)


def _inside(target: Any, part: str | int, at: KeyPath, place: str) -> Any:
    """What `target`, which stands at `at`, holds under `part`; a mapping makes room for it."""
    if isinstance(target, dict):
        return cast(Any, target).setdefault(part, {})
    if isinstance(target, list) and _has(target, part):
        return cast(Any, target)[part]
    raise RecipeError(f"{place}: {spell(at) or 'the recipe'} holds no {part!r}")


def spell(at: Iterable[str | int]) -> str:
    """("rules", 0, "sparsity") → "rules[0].sparsity"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).removeprefix(".")


def _keys(model: type[BaseModel], at: KeyPath) -> list[str]:
    """The keys that the mapping around `at` may hold."""
    owner = model
    for part in at[:-1]:
        inner = owner.model_fields[part].annotation if isinstance(part, str) else None
        parts = getattr(inner, "__args__", ())
        owner = next((kind for kind in parts if isinstance(kind, type) and issubclass(kind, BaseModel)), owner)
    return list(owner.model_fields)


def _wanted(error: Mapping[str, Any]) -> str:
    kind, context = str(error["type"]), error.get("ctx", {})
    if kind.startswith("int"):
        return "a whole number"
    if kind.startswith("bool"):
        return "true or false"
    if kind.startswith("string"):
        return "text; quote it if it looks like a number"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind == "greater_than_equal":
        return f"at least {context['ge']}"
    if kind == "less_than_equal":
        return f"at most {context['le']:g}"
    if kind == "greater_than":
        return f"more than {context['gt']:g}"
    if kind.startswith(("float", "finite")):
        return "a number"
    if kind == "less_than":
        return f"less than {context['lt']}"
    if kind.startswith(("tuple", "list")):
        return "a list"
    if kind.startswith(("model", "dict")):
        return "a mapping such as {match: '*.down_proj', sparsity: 0.5}"
    return str(error["msg"]).lower()
