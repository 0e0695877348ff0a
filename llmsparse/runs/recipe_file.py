"""Recipes as YAML: find one, read it with the line of every key, write one.

Scalars are read as YAML 1.2 has it: `2:4` is text (YAML 1.1 makes it 124), `1e-3` is a number, `yes` is text. A key
that stands twice is an error. Knows nothing of what the keys mean.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llmsparse.errors import KeyPath, RecipeError, did_you_mean
from llmsparse.runs.verbs import VERBS
from llmsparse.storage.disk import spell_size

ALIAS = "holds an alias (*name), which a recipe must not: write out what it stands for, or quote a pattern ('*.q_proj')"
TAG = "holds a tag (!{}), which a recipe must not: leave it out, or quote the text"
TOO_DEEP = "nests too deep for a recipe"

LARGEST = 1 << 20  # bytes: more is no recipe, and YAML is read slowly

_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}
_INT = re.compile(r"[-+]?[0-9]{1,4000}")  # Python makes a number of so many digits
_NOTE = re.compile(r"# ([^:]+): (.*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def shipped(kind: str = "") -> dict[str, Path]:
    """The recipes that come with llmsparse, by name: in the wheel, or beside the package in a source checkout.

    Those of `prune` lie in the folder itself, others in one named after their verb, `kind`.
    """
    from importlib.resources import files

    inside = Path(str(files("llmsparse").joinpath("recipes")))
    folder = inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"
    return {path.stem: path for path in sorted((folder / kind).glob("*.yaml"))}


def all_shipped() -> dict[str, Path]:
    """Those of every verb; a name that an earlier verb has too stands behind its own verb's, as `tune/NAME`."""
    found: dict[str, Path] = {}
    for verb in VERBS.values():
        own = shipped(verb.shipped)
        clash = not found.keys().isdisjoint(own)
        found |= {f"{verb.shipped}/{name}" if clash else name: path for name, path in own.items()}
    return found


def find(recipe: str | Path, kind: str = "") -> Path:
    """The file of a recipe given as a path or as the name of a shipped one of `kind`. RecipeError if there is neither."""
    path = Path(recipe)
    if path.is_file():
        return path
    known = shipped(kind)
    asked = str(recipe).removeprefix(f"{kind}/") if kind else str(recipe)
    if asked in known:
        return known[asked]
    if path.is_dir():
        raise RecipeError(f"{recipe}: is a folder, wanted a recipe file or one of {', '.join(known)}")
    if path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"{recipe}: no such recipe file; `llmsparse recipes list` shows the shipped ones")
    for name, verb in VERBS.items():
        if str(recipe).removeprefix(f"{verb.shipped}/") in shipped(verb.shipped):
            raise RecipeError(f"{recipe}: a recipe of {name}; shipped here are {', '.join(known)}")
    raise RecipeError(f"no recipe {str(recipe)!r}, neither a file nor shipped{did_you_mean(str(recipe), list(known))}")


def read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The mapping a file holds, and the line of each of its keys. RecipeError for anything but one mapping."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise RecipeError(f"{path}: is no recipe: {spell_size(size)}, wanted {spell_size(LARGEST)} at most")
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not text, wanted a YAML recipe") from None
    except _Forbidden as error:
        raise RecipeError(f"{path}:{error.line}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RecipeError(f"{path}: {TOO_DEEP}") from None
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}:1: holds no `key: value` lines, wanted a recipe such as `sparsity: 0.5`")
    lines: dict[KeyPath, int] = {}
    try:
        return _construct(node, (), lines, path), lines
    except RecursionError:
        raise RecipeError(f"{path}: {TOO_DEEP}") from None


def notes(path: Path) -> dict[str, str]:
    """The `# key: value` lines that `write` put at the head of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {found[1]: found[2] for found in map(_NOTE.fullmatch, itertools.takewhile(_NOTE.fullmatch, lines)) if found}


def parse_value(text: str) -> Any:
    """The value in `key=value`: a YAML scalar, list or mapping, or the text as it is (`*.q_proj`)."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except _Forbidden as error:
        if error.meant:
            raise RecipeError(f"{text[:40]}: {error}") from None
        return text  # a pattern: *q_proj
    except yaml.YAMLError:
        return text
    except RecursionError:
        raise RecipeError(f"{text[:40]}…: {TOO_DEEP}") from None
    try:
        return text if node is None else _construct(node, (), {}, Path(text))
    except RecursionError:
        raise RecipeError(f"{text[:40]}…: {TOO_DEEP}") from None


def write(data: Mapping[str, Any], comments: Mapping[str, Any]) -> str:
    """YAML that `read` gives back as `data`, under one `# key: value` line for each comment."""
    head = "".join(f"# {key}: {value}\n" for key, value in comments.items())
    return head + yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _construct(node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], path: Path) -> Any:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in mapping:
                raise RecipeError(f"{path}:{line}: key {key!r} stands twice; keep one of them")
            lines[(*at, key)] = line
            mapping[key] = _construct(value_node, (*at, key), lines, path)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*at, index), lines, path) for index, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node.value) if node.style is None else node.value


def _scalar(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


class _Forbidden(yaml.YAMLError):
    """An alias or a tag on a line; `meant` unless it may be a text, as an alias whose anchor does not stand before it."""

    def __init__(self, what: str, line: int, meant: bool) -> None:
        super().__init__(what)
        self.line, self.meant = line, meant


class _Loader(yaml.BaseLoader):
    """Stops at an alias, for nine of them on each of nine lines are 400 million nodes, and at a tag, which has no effect."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _Forbidden(ALIAS, line, event.anchor in self.anchors)
        if getattr(event, "tag", None) not in (None, "!"):
            raise _Forbidden(TAG.format(event.tag.rpartition(":")[2].lstrip("!")), line, True)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_scalar` would read as something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = not isinstance(_scalar(text), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if quoted else None)


_Dumper.add_representer(str, _represent_text)
