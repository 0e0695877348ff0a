"""How verbs are registered: the switches that all of them take, and one flag for each key of a recipe."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer

from llmsparse.cli.terminal import Terminal
from llmsparse.runs.keys import KEYS, Key

if TYPE_CHECKING:
    from llmsparse.runs.recipe import RunRecipe

Verb = TypeVar("Verb", bound=Callable[..., None])
Chosen = TypeVar("Chosen", bound="RunRecipe")

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show neither progress nor notes on stderr.", show_default=False)
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Show what libraries log and, where no terminal shows bars, a line for every block.",
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)]
MODEL = "Checkpoint folder, hub id, or builtin"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODEL}.", show_default=False)]
ModelOrRecipe = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{MODEL}; may be left out if the recipe names it.", show_default=False),
]
Assignments = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Any key of a recipe, such as method.damp=0.1.", show_default=False),
]
FactorAssignments = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Any key of a recipe, such as router_steps=100.", show_default=False),
]
TuneAssignments = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Any key of a recipe, such as kl_weight=0.5.", show_default=False),
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
Output = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.", show_default=False)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint that is there.", show_default=False)
]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Size of the largest file to write.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda:0.")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="auto, float32, bfloat16 or float16, to compute in.")]
Revision = Annotated[
    str | None, typer.Option(metavar="R", help="Branch, tag or commit on the hub.", show_default=False)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model.", show_default=False)
]
Experts = Annotated[
    str,
    typer.Option(metavar="auto|NAME", help="What runs dense experts: llmsparse, or as transformers calls it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.", show_default=False)]


def recipe_from(
    kind: type[Chosen],
    model: str | None,
    assignments: list[str] | None,
    recipe: str | None,
    flags: dict[str, Any],
    resume: bool,
    overwrite: bool,
) -> Chosen:
    """The recipe of a command line; its first word may be an assignment where the recipe names the model.

    RecipeError for what no recipe can be made of, and for --resume beside --overwrite.
    """
    from llmsparse.runs.recipe import refuse_both

    refuse_both(resume, overwrite)
    given = {key: value for key, value in flags.items() if value not in (None, [])}
    if model is not None and "=" in model and not os.path.exists(model):
        model, assignments = None, [model, *(assignments or ())]
    return kind.load(recipe, {"model": model, **given}, assignments or ())


def verb(
    app: typer.Typer,
    name: str | None = None,
    *,
    recipe_flags: bool = False,
    keys: Mapping[str, Mapping[str, Key]] = KEYS,
) -> Callable[[Verb], Verb]:
    """Register a function as a command. It gets the Terminal first, then its own options.

    -q, -v and --debug are added to these, and with `recipe_flags` the `keys` of a recipe, which it gets as `**flags`,
    None where a flag was not given.
    """

    def register(function: Verb) -> Verb:
        def run(ctx: typer.Context, quiet: bool, verbose: bool, debug: bool, **options: Any) -> None:
            terminal: Terminal = ctx.obj
            terminal.add(quiet, verbose, debug)
            function(terminal, **options)

        own = [
            parameter
            for parameter in list(inspect.signature(function, eval_str=True).parameters.values())[1:]
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        parameters = [
            inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
            *(_recipe_flags(keys) if recipe_flags else []),
            *(_flag(key, kind, False) for key, kind in (("quiet", Quiet), ("verbose", Verbose), ("debug", Debug))),
        ]
        for parameter in parameters[1:]:
            _show_no_type_of_switches(parameter)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        app.command(name or function.__name__)(run)
        return function

    return register


def _show_no_type_of_switches(parameter: inspect.Parameter) -> None:
    """A switch takes no value, so `--help` need not say of which type."""
    kind, *described = get_args(parameter.annotation)
    if kind in (bool, bool | None):
        described[0].metavar = ""


def _recipe_flags(keys: Mapping[str, Mapping[str, Key]]) -> list[inspect.Parameter]:
    return [_recipe_flag(name, key, panel) for panel, group in keys.items() for name, key in group.items()]


def _recipe_flag(name: str, key: Key, panel: str) -> inspect.Parameter:
    default = f" [dim]\\[default: {key.default}][/dim]" if key.default is not None else ""
    option: Any = typer.Option(
        *(["--output", "-o"] if name == "output" else []),
        help=f"{key.help}{default}",
        metavar=key.metavar,
        rich_help_panel=panel,
        show_default=False,
    )
    kind = list[str] if key.kind is list else key.kind
    return _flag(name, Annotated[kind | None, option], None)


def _flag(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
