"""How verbs are registered, and the options that several of them take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, get_args

import typer

from llmsparse.cli.terminal import Terminal

Verb = TypeVar("Verb", bound=Callable[..., None])

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
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Leave packed experts on disk, but for as many as fit into this, such as 2GB.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.", show_default=False)]


def verb(
    app: typer.Typer,
    name: str | None = None,
    *,
    more: Sequence[inspect.Parameter] = (),
    help: str | None = None,
    several: bool = False,
) -> Callable[[Verb], Verb]:
    """Register a function as a command. It gets the Terminal first, then its own options.

    -q, -v and --debug are added to these, and `more` options, which it gets as `**flags`. `help` is its docstring if
    not given. `several`: processes that torchrun starts can share its work.
    """

    def register(function: Verb) -> Verb:
        def run(ctx: typer.Context, quiet: bool, verbose: bool, debug: bool, **options: Any) -> None:
            terminal: Terminal = ctx.obj
            terminal.add(quiet, verbose, debug)
            terminal.share(several)
            function(terminal, **options)

        own = [
            parameter
            for parameter in list(inspect.signature(function, eval_str=True).parameters.values())[1:]
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        parameters = [
            inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
            *more,
            *(option(key, kind, False) for key, kind in (("quiet", Quiet), ("verbose", Verbose), ("debug", Debug))),
        ]
        for parameter in parameters[1:]:
            _show_no_type_of_switches(parameter)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = help or function.__doc__
        app.command(name or function.__name__)(run)
        return function

    return register


def _show_no_type_of_switches(parameter: inspect.Parameter) -> None:
    """A switch takes no value, so `--help` need not say of which type."""
    kind, *described = get_args(parameter.annotation)
    if kind in (bool, bool | None):
        described[0].metavar = ""


def option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
