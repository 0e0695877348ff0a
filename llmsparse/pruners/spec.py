"""A method as a recipe names it ⇄ a `Pruner`, or an entry of another table of dataclasses.

`wanda`, or a mapping `{name: dsnot, max_cycles: 20, initial: {name: sparsegpt, damp: 0.1}}`: the options are the fields
of the method's dataclass, checked against their types, and a field of type `Pruner` takes a method of its own.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from llmsparse.errors import KeyPath, OptionError, RecipeError, did_you_mean
from llmsparse.pruners import PRUNERS, Pruner

MethodSpec = str | dict[str, Any]


def build(spec: MethodSpec, path: KeyPath = ("method",)) -> Pruner:
    """The pruner that `spec` describes. OptionError for an unknown name or option, or a value of the wrong type."""
    return build_from(PRUNERS, "method", spec, path)


def build_from(table: Mapping[str, type[Any]], kind: str, spec: MethodSpec, path: KeyPath) -> Any:
    """The same from another table, whose entries are called a `kind`."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in table:
        raise OptionError(path, f"unknown {kind} {name!r}{did_you_mean(str(name), list(table))}")
    method: type[Any] = table[name]
    hints = get_type_hints(method, localns={"Pruner": Pruner})
    known = [field.name for field in fields(method) if field.init]
    values: dict[str, Any] = {}
    for key, value in options.items():
        here = (*path, key)
        if key not in known:
            none = "; it has none" if not known else did_you_mean(key, known)
            raise OptionError(here, f"{kind} {name} has no option {key!r}{none}")
        values[key] = build(value, here) if hints[key] is Pruner else _checked(value, hints[key], here)
    try:
        return method(**values)
    except ValueError as error:  # raised by the method's own __post_init__
        raise OptionError(path, f"{kind} {name}: {error}") from None


def describe(pruner: Pruner) -> dict[str, Any]:
    """The mapping that `build` turns into an equal pruner, every option spelled out. RecipeError if it is no method."""
    name = name_in(PRUNERS, pruner)
    if name is None:
        raise RecipeError(f"method {type(pruner).__name__} has no name; add it to PRUNERS in llmsparse/pruners")
    return described(name, pruner)


def described(name: str, entry: Any) -> dict[str, Any]:
    """The mapping of a dataclass of any table under its name there."""
    names = [field.name for field in fields(entry) if field.init]
    return {"name": name} | {key: _plain(getattr(entry, key)) for key in names}


def name_in(table: Mapping[str, type[Any]], entry: Any) -> str | None:
    """What an entry of a table is called there."""
    return next((name for name, kind in table.items() if type(entry) is kind), None)


def _plain(value: Any) -> Any:
    """An option as YAML can hold it."""
    if isinstance(value, tuple(PRUNERS.values())):
        return describe(value)
    return list(cast(tuple[Any, ...], value)) if type(value) is tuple else value


def _checked(value: Any, hint: Any, path: KeyPath) -> Any:
    wants_bool = hint is bool or bool in get_args(hint)
    if isinstance(value, Mapping) or (isinstance(value, bool) and not wants_bool):
        raise OptionError(path, f"got {value!r}, wanted {_spell(hint)}")
    try:
        return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError:
        raise OptionError(path, f"got {value!r}, wanted {_spell(hint)}") from None


def _spell(hint: Any) -> str:
    """`float | None` → "a number or nothing"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    if hint in words:
        return words[hint]
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_spell(part) for part in get_args(hint))
    return " or ".join(str(part) for part in get_args(hint)) or str(hint)
