"""`llmsparse recipes`: look at the shipped ones, copy one to change it, check a file."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmsparse.cli.options import Json, verb
from llmsparse.cli.terminal import Terminal
from llmsparse.errors import MachineError, RecipeError, did_you_mean
from llmsparse.runs.verbs import VERBS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType

    from llmsparse.runs.recipe import RunRecipe

app = typer.Typer(no_args_is_help=False)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe.", show_default=False)]


@dataclass(frozen=True)
class RecipeList:
    """Name and purpose of every shipped recipe."""

    purposes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"recipes": [{"name": name, "purpose": purpose} for name, purpose in self.purposes.items()]}

    def table(self) -> RenderableType:
        from rich.table import Table

        table = Table("recipe", "what for", box=None, pad_edge=False)
        for name, purpose in self.purposes.items():
            table.add_row(name, purpose)
        return table


@verb(app, "list")
def list_recipes(terminal: Terminal, json: Json = False) -> None:
    """List the recipes that come with llmsparse, and what each is for."""
    from llmsparse.runs import recipe_file

    terminal.show(RecipeList({name: purpose(path) for name, path in recipe_file.all_shipped().items()}), json)


@verb(app)
def show(terminal: Terminal, name: Name) -> None:
    """Print a shipped recipe."""
    print(_shipped(name).read_text(encoding="utf-8"), end="")


@verb(app)
def copy(
    terminal: Terminal,
    name: Name,
    to: Annotated[str | None, typer.Argument(metavar="[TO]", help="File or folder; ./NAME.yaml if not given.")] = None,
) -> None:
    """Copy a shipped recipe to a file of your own."""
    source = _shipped(name)
    target = Path(to or source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise RecipeError(f"{target}: exists; name another file, or delete it first")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise MachineError(f"{target}: cannot be written ({error.strerror})") from error
    print(target)


@verb(app)
def validate(
    terminal: Terminal,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A recipe file, or a shipped name.", show_default=False)],
) -> None:
    """Check a recipe: keys, values, method options, patterns. Prints it with every default spelled out."""
    from llmsparse.runs import recipe_file

    path = recipe_file.all_shipped().get(file) or recipe_file.find(file)
    data, _ = recipe_file.read(path)
    kind = kind_of(data)
    wanted = ("model", "teacher", "text")  # what a recipe may leave to the command line
    flags = {key: key.upper() for key in wanted if key not in data and key in kind.model_fields}
    print(kind.load(path, flags).dump({"valid": path}), end="")


def kind_of(data: Mapping[str, Any]) -> type[RunRecipe]:
    """The kind of recipe that knows the most of these keys, of the first verb that does."""
    kinds = [verb.load_recipe() for verb in VERBS.values()]
    return max(kinds, key=lambda kind: sum(key in kind.model_fields for key in data))


def purpose(path: Path) -> str:
    """The first line of a shipped recipe, a comment that says what for."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _shipped(name: str) -> Path:
    from llmsparse.runs import recipe_file

    known = recipe_file.all_shipped()
    if name not in known:
        raise RecipeError(f"no shipped recipe {name!r}{did_you_mean(name, list(known))}")
    return known[name]
