"""The verb that serves a model, and the one that measures it."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Annotated

import typer

from llmsparse.cli.options import Device, Dtype, ExpertMemory, Experts, Json, Model, Revision, TrustRemoteCode, verb
from llmsparse.cli.terminal import Terminal
from llmsparse.errors import RecipeError

app = typer.Typer()


@verb(app)
def serve(
    terminal: Terminal,
    model: Model,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is all of the machine's.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="LLMSPARSE_API_KEY",
            help="Answer only requests that carry this key.",
            show_default=False,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What the model is called; else MODEL as typed.", show_default=False),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let web pages of this origin use the server (CORS), `*` for all; may be given several times.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(metavar="auto|NAME", help="What runs packed weights; a name packs a pruned MODEL as it loads."),
    ] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    experts: Experts = "auto",
    expert_memory: ExpertMemory = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens kept of all conversations together; what fits on a GPU, 16384 on a CPU if not given.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve MODEL, dense, pruned or packed, as OpenAI's API: chat/completions, completions, models; health, metrics.

    llmsparse serve ./packed --port 8000
    """
    terminal.calm_libraries()
    from llmsparse.serving import server as serve

    serve.serve(
        model,
        host=host,
        port=port,
        api_key=api_key,
        served_model_name=served_model_name,
        allow_origins=allow_origin or (),
        backend=backend,
        device=device,
        dtype=dtype,
        experts=experts,
        expert_memory=expert_memory,
        revision=revision,
        trust_remote_code=trust_remote_code,
        cache_tokens=cache_tokens,
        say=lambda line: print(line, flush=True),
    )


@verb(app)
def bench(
    terminal: Terminal,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Pruned or packed folder, or hub id.", show_default=False)
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(metavar="NAME|OUTxIN,...", help="Synthetic weights, such as llama-3-8b's.", show_default=False),
    ] = None,
    sparsity: Annotated[
        float, typer.Option(min=0.0, max=0.99, metavar="S", help="Fraction of zeros in --shapes.")
    ] = 0.7,
    pattern: Annotated[
        str, typer.Option(metavar="unstructured|N:M", help="Pattern of the zeros in --shapes.")
    ] = "unstructured",
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16, of --shapes.")
    ] = "bfloat16",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Rows of activations at once.")] = "1,2,4,8,16,32",
    device: Device = "auto",
    backend: Annotated[str, typer.Option(metavar="all|NAME", help="What to measure beside dense.")] = "all",
    seconds: Annotated[
        float, typer.Option(min=0.0, metavar="S", help="Time to measure each weight and batch for.")
    ] = 1.0,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Generate with MODEL too, dense beside packed.")
    ] = True,
    save: Annotated[
        bool, typer.Option("--save", help="Let the backend `auto` choose by what was measured.", show_default=False)
    ] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure dense and every backend side by side on the weights of MODEL, or on synthetic ones of --shapes.

    llmsparse bench ./packed --save
    """
    os.environ.setdefault("OMP_PROC_BIND", "true")  # before torch starts its threads: each stays on its core
    terminal.calm_libraries()
    import_module("llmsparse.benchmark.decoding")  # before torch too: see CORES
    from llmsparse.benchmark.run import bench

    result = bench(
        model,
        shapes=shapes,
        sparsity=sparsity,
        pattern=pattern,
        dtype=dtype,
        batches=_batches(batch),
        device=device,
        backend=backend,
        seconds=seconds,
        end_to_end=decode,
        save=save,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=terminal.progress(),
    )
    terminal.show(result, json)


def _batches(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--batch {text!r}: wanted numbers with commas between them, such as 1,4,16") from None
