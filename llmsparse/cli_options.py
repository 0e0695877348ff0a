"""How verbs are registered: the switches that all of them take, and one flag for each key of a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import typer

from llmsparse.recipe_keys import KEYS, Key
from llmsparse.terminal import Terminal

Verb = TypeVar("Verb", bound=Callable[..., None])

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.", show_default=False)]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Show what libraries log; in a pipe or file, a line a block.", show_default=False
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)]
Model = Annotated[str, typer.Argument(help="Checkpoint folder, hub id, or builtin.", show_default=False)]
Revision = Annotated[
    str | None, typer.Option(metavar="R", help="Branch, tag or commit on the hub.", show_default=False)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model.", show_default=False)
]
Assignments = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Any key of a recipe, such as method.damp=0.1.", show_default=False),
]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE|NAME", help="Start from a recipe; flags override it.", show_default=False),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Take up an interrupted run.", rich_help_panel="Output", show_default=False)
]
Replace = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there.", rich_help_panel="Output", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", show_default=False)]


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
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        app.command(name or function.__name__)(run)
        return function

    return register


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
