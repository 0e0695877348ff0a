"""How verbs are registered: the switches that all of them take, and one flag for each key of a recipe."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer

from llmsparse.recipe import Recipe
from llmsparse.terminal import Terminal

Verb = TypeVar("Verb", bound=Callable[..., None])

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.", show_default=False)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries log.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", show_default=False)]

PANELS = {
    "What is pruned, and how": (
        *("method", "sparsity", "pattern", "scope", "only", "include", "exclude", "true_sequential", "match_steps"),
    ),
    "Calibration": ("calibration", "text_field", "calibration_samples", "seq_len", "batch_size", "seed"),
    "Machine and model": ("device", "dtype", "revision", "trust_remote_code"),
    "Output": ("output", "max_shard_size"),
}
METAVARS = {
    "method": "NAME",
    "sparsity": "S",
    "pattern": "N:M",
    "only": "GLOB",
    "include": "GLOB",
    "exclude": "GLOB",
    "calibration": "TEXT",
    "text_field": "COLUMN",
    "output": "DIR",
    "max_shard_size": "SIZE",
}


def verb(app: typer.Typer, name: str | None = None, *, recipe_flags: bool = False) -> Callable[[Verb], Verb]:
    """Register a function as a command. It gets the Terminal first, then its own options.

    -q, -v and --debug are added to these, and with `recipe_flags` the keys of a recipe, which it gets as `**flags`,
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
            *(_recipe_flags() if recipe_flags else []),
            *(_flag(key, kind, False) for key, kind in (("quiet", Quiet), ("verbose", Verbose), ("debug", Debug))),
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        app.command(name or function.__name__)(run)
        return function

    return register


def _recipe_flags() -> list[inspect.Parameter]:
    """One option for each key of a recipe but `model`, an argument, and `rules`, which only a file can spell."""
    return [_recipe_flag(key, panel) for panel, keys in PANELS.items() for key in keys]


def _recipe_flag(key: str, panel: str) -> inspect.Parameter:
    field = Recipe.model_fields[key]
    default = field.default
    shown = (
        f" [dim]\\[default: {default}][/dim]"
        if isinstance(default, str | int) and not isinstance(default, bool)
        else ""
    )
    names = ["--output", "-o"] if key == "output" else []
    kind = _option_type(field.annotation)
    option: Any = typer.Option(
        *names,
        help=f"{field.description}{shown}",
        metavar=METAVARS.get(key, None if kind == bool | None else key.split("_")[-1].upper()),
        rich_help_panel=panel,
        show_default=False,
    )
    return _flag(key, Annotated[kind, option], None)


def _option_type(annotation: Any) -> Any:
    """Flags arrive as text, which the recipe checks; only switches and repeatable globs need more."""
    if annotation is bool:
        return bool | None
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return list[str] | None if any(get_origin(part) is tuple for part in parts) else str | None


def _flag(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
