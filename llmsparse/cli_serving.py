"""The verb that serves a model, and the one that measures it."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsparse.cli_options import Model, Revision, TrustRemoteCode, verb
from llmsparse.terminal import Terminal

app = typer.Typer()

Device = Annotated[str, typer.Option(help="auto, cpu or cuda:0.")]


@verb(app)
def serve(
    terminal: Terminal,
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="LLMSPARSE_API_KEY", help="Only answer who sends it.", show_default=False),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(metavar="auto|NAME", help="What runs packed weights; a name packs a pruned MODEL as it loads."),
    ] = "auto",
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve MODEL, dense, pruned or packed, as OpenAI's API: chat/completions, completions, models, health.

    llmsparse serve ./packed --port 8000
    """
    terminal.calm_libraries()
    from llmsparse import serve

    serve.serve(
        model,
        host=host,
        port=port,
        api_key=api_key,
        backend=backend,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        say=lambda line: print(line, flush=True),
    )
