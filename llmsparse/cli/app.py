"""The command line: each verb is one call into the library.

stdout carries the result, stderr progress and errors. Imports neither torch nor transformers until a verb needs them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

from llmsparse.cli import packing as cli_packing
from llmsparse.cli import recipes as cli_recipes
from llmsparse.cli import running as cli_run
from llmsparse.cli import serving as cli_serving
from llmsparse.cli.exit import exit_code_of
from llmsparse.cli.options import Debug, Device, Dtype, Json, Model, Quiet, Revision, TrustRemoteCode, Verbose, verb
from llmsparse.cli.recipe_verbs import add_recipe_verb
from llmsparse.cli.terminal import Terminal
from llmsparse.errors import RecipeError
from llmsparse.ranks.place import launched
from llmsparse.runs.keys import BATCH, BOS, COLUMN, WINDOW
from llmsparse.runs.verbs import VERBS
from llmsparse.version import __version__

PLAN_HELP = "Show what `prune` would do: weights, memory, disk. Writes nothing, and downloads no weights."

app = typer.Typer(add_completion=False, rich_markup_mode="rich")
app.add_typer(cli_recipes.app, name="recipes", help="Look at the shipped recipes, copy one, check a file.")


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", show_default=False)] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make a trained language model sparse, and know what it costs.

    llmsparse prune MODEL --sparsity 0.5
    """
    ctx.obj.add(quiet, verbose, debug)
    if version:
        print(f"llmsparse {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


for name in VERBS:
    add_recipe_verb(app, name)
add_recipe_verb(app, "prune", "plan", help=PLAN_HELP, plan_only=True)


@verb(app, "eval", several=True)
def evaluate(
    terminal: Terminal,
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="wikitext2, c4, builtin, a .txt, .jsonl, .parquet or .safetensors file, or ORG/NAME:SPLIT.",
            show_default=False,
        ),
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, metavar="N", help=f"{WINDOW}.", show_default=False)] = None,
    windows: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Measure only the first so many windows.", show_default=False),
    ] = None,
    text_field: Annotated[str | None, typer.Option(metavar="COLUMN", help=f"{COLUMN}.", show_default=False)] = None,
    bos: Annotated[
        Literal["each", "once", "none"] | None, typer.Option(metavar="WHERE", help=f"{BOS}.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measure this one too, on the same text.", show_default=False)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="N", help=f"{BATCH}.", show_default=False)] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure the perplexity of MODEL on a text, streamed: a model larger than memory will do.

    llmsparse eval ./pruned --text wikitext2 --baseline meta-llama/Llama-3.2-1B
    """
    if text is None:
        raise RecipeError(
            "eval needs a text: --text wikitext2, --text builtin (Python's standard library) or --text FILE"
        )
    terminal.calm_libraries()
    from llmsparse.evaluation.comparison import Comparison
    from llmsparse.evaluation.perplexity import perplexity

    if baseline is not None:  # a slip in its name shows before the hours that MODEL may take
        from llmsparse.models.origin import fetch_model, load_config

        load_config(fetch_model(baseline), trust_remote_code, packed=True, encoded=True)
    options: dict[str, Any] = {
        "windows": windows,
        "text_field": text_field,
        "bos": bos,
        "batch_size": batch_size,
        "device": device,
    }
    options |= {"dtype": dtype, "trust_remote_code": trust_remote_code, "progress": terminal.progress()}
    result = perplexity(model, text, seq_len=seq_len, revision=revision, **options)
    if baseline is None:
        return terminal.show(result, json)
    dense = perplexity(baseline, text, seq_len=result.protocol["seq_len"], **options)
    return terminal.show(Comparison(result, dense), json)


@verb(app)
def profile(
    terminal: Terminal,
    model: Model,
    calibration: Annotated[
        str, typer.Option(metavar="TEXT", help="builtin, wikitext2, c4, a file, or ORG/NAME:SPLIT.")
    ] = "builtin",
    calibration_samples: Annotated[int, typer.Option(min=1, metavar="N", help="Windows to look at.")] = 16,
    seq_len: Annotated[int | None, typer.Option(min=2, metavar="N", help=f"{WINDOW}.", show_default=False)] = None,
    text_field: Annotated[str | None, typer.Option(metavar="COLUMN", help=f"{COLUMN}.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="N", help=f"{BATCH}.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the windows that are drawn.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Show how sparse the activations of MODEL are: lazy hidden units, and what the larger half of inputs holds.

    llmsparse profile meta-llama/Llama-3.2-1B --calibration wikitext2
    """
    terminal.calm_libraries()
    from llmsparse.cutting import profile as profiling

    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "device": device, "dtype": dtype}
    options |= {"text_field": text_field, "revision": revision, "trust_remote_code": trust_remote_code}
    found = profiling.profile(
        model, calibration, samples=calibration_samples, seq_len=seq_len, progress=terminal.progress(), **options
    )
    terminal.show(found, json)


@verb(app)
def inspect(
    terminal: Terminal,
    model: Model,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check the masks and checksums of a packed MODEL too.", show_default=False),
    ] = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Show sparsity, pattern and size of every weight of MODEL, dense or packed, and totals."""
    terminal.calm_libraries()
    from llmsparse.packing import inspect as inspection

    terminal.show(inspection.inspect(model, revision=revision, verify=verify), json)


@verb(app)
def demo(terminal: Terminal, json: Json = False) -> None:
    """Prune the model that comes with llmsparse by every method, and compare. No download, about two minutes."""
    terminal.calm_libraries(downloads=False)
    from llmsparse.demo import run as demo

    terminal.show(demo.run(terminal.progress()), json)


app.add_typer(cli_packing.app)
app.add_typer(cli_run.app)
app.add_typer(cli_serving.app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (of this process if not given) and return its exit code."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started the process: `>&-`
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    argv = list(sys.argv[1:] if arguments is None else arguments)
    terminal = Terminal(argv)

    def run() -> None:
        terminal.place = launched()
        with typer.main.get_command(app).make_context("llmsparse", list(argv), obj=terminal) as context:
            context.command.invoke(context)

    return exit_code_of(run, terminal)
