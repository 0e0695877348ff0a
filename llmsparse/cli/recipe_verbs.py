"""The verbs that run a recipe: one command each, with a flag for every key of its recipe."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmsparse.cli.options import MODEL, Json, option, verb
from llmsparse.cli.terminal import Terminal
from llmsparse.errors import RecipeError
from llmsparse.ranks.launch import joined
from llmsparse.runs.keys import Key
from llmsparse.runs.verbs import VERBS

if TYPE_CHECKING:
    from llmsparse.runs.recipe import RunRecipe

ModelOrRecipe = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{MODEL}; may be left out if the recipe names it.", show_default=False),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE|NAME",
        help="Start from a recipe, a file or one of `llmsparse recipes list`; flags override it.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on with an interrupted run to this output.", rich_help_panel="Output", show_default=False
    ),
]
Restart = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace the checkpoint or the interrupted run that is there.",
        rich_help_panel="Output",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only show what would be done; nothing is written.",
        rich_help_panel="Output",
        show_default=False,
    ),
]


Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Plan for each of so many processes that torchrun would start.",
        rich_help_panel="Output",
        show_default=False,
    ),
]  # fmt: skip


def add_recipe_verb(
    app: typer.Typer, name: str, command: str | None = None, *, help: str | None = None, plan_only: bool = False
) -> None:
    """Register a verb of VERBS, as `command` if that is another name; with `plan_only` it never does more than plan."""
    described = VERBS[name]
    assignments = Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help=f"Any key of a recipe, such as {described.example}.", show_default=False
        ),
    ]
    options = [
        option("model", ModelOrRecipe, None),
        option("assignments", assignments, None),
        option("recipe", RecipeName, None),
        option("resume", Resume, False),
        option("overwrite", Restart, False),
        *([] if plan_only else [option("dry_run", DryRun, False)]),
        option("processes", Processes, None),
        option("json", Json, False),
        *recipe_flags(described.keys),
    ]

    def run(terminal: Terminal, **given: Any) -> None:
        how = {switch: given.pop(switch) for switch in ("resume", "overwrite")}
        json, dry_run, processes = given.pop("json"), given.pop("dry_run", plan_only), given.pop("processes", None)
        terminal.calm_libraries()
        with joined().together():
            if processes is not None and not dry_run:
                raise RecipeError(
                    f"--processes {processes}: is about a plan; add --dry-run, or start so many with torchrun --nproc-per-node"
                )
            chosen = recipe_from(described.load_recipe(), given, **how)
        if dry_run:
            plan = described.load_make_plan()(chosen, **how, download=False)
            return terminal.show(plan if processes is None else plan.of_processes(processes), json)
        terminal.will_write(chosen.output_folder)
        return terminal.show(described.load_run()(chosen, **how, progress=terminal.progress()), json)

    verb(app, command or name, more=options, help=help or described.help, several=True)(run)


def recipe_from(kind: type[RunRecipe], given: dict[str, Any], *, resume: bool, overwrite: bool) -> RunRecipe:
    """The recipe of a command line; its first word may be an assignment where the recipe names the model.

    RecipeError for what no recipe can be made of, and for --resume beside --overwrite.
    """
    from llmsparse.runs.recipe import refuse_both

    refuse_both(resume, overwrite)
    model, assignments, recipe = (given.pop(name) for name in ("model", "assignments", "recipe"))
    flags = {key: value for key, value in given.items() if value not in (None, [])}
    if model is not None and "=" in model and not os.path.exists(model):
        model, assignments = None, [model, *(assignments or ())]
    return kind.load(recipe, {"model": model, **flags}, assignments or ())


def recipe_flags(keys: Mapping[str, Mapping[str, Key]]) -> list[inspect.Parameter]:
    return [_recipe_flag(name, key, panel) for panel, group in keys.items() for name, key in group.items()]


def _recipe_flag(name: str, key: Key, panel: str) -> inspect.Parameter:
    default = f" [dim]\\[default: {key.default}][/dim]" if key.default is not None else ""
    described: Any = typer.Option(
        *(["--output", "-o"] if name == "output" else []),
        help=f"{key.help}{default}",
        metavar=key.metavar,
        rich_help_panel=panel,
        show_default=False,
    )
    kind = list[str] if key.kind is list else key.kind
    return option(name, Annotated[kind | None, described], None)
