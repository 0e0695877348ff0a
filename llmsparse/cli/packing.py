"""The verbs that store a checkpoint without its zeros, and give them back."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmsparse.cli.options import Json, MaxShardSize, Model, Output, Overwrite, Revision, TrustRemoteCode, verb
from llmsparse.cli.terminal import Terminal

app = typer.Typer()


@verb(app)
def pack(
    terminal: Terminal,
    model: Model,
    output: Output,
    overwrite: Overwrite = False,
    max_shard_size: MaxShardSize = "5GB",
    drop_negative_zeros: Annotated[
        bool,
        typer.Option(
            "--drop-negative-zeros",
            help="Store -0.0, which other tools leave in pruned places, as 0.0: smaller, but not bit for bit.",
            show_default=False,
        ),
    ] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Store a pruned MODEL without its zeros; `unpack` gives it back bit for bit.

    llmsparse pack ./pruned -o ./packed
    """
    terminal.calm_libraries()
    from llmsparse.packing import pack as packing

    options: dict[str, Any] = {"revision": revision, "overwrite": overwrite, "trust_remote_code": trust_remote_code}
    options |= {"max_shard_size": max_shard_size, "progress": terminal.progress()}
    options["drop_negative_zeros"] = drop_negative_zeros
    terminal.show(packing.pack(model, output, **options), json)


@verb(app)
def unpack(
    terminal: Terminal,
    model: Model,
    output: Output,
    overwrite: Overwrite = False,
    max_shard_size: MaxShardSize = "5GB",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Give a packed MODEL its zeros back: an ordinary checkpoint. Opens compressed-tensors' sparse formats too.

    llmsparse unpack ./packed -o ./pruned
    """
    terminal.calm_libraries()
    from llmsparse.packing import unpack as unpacking

    options: dict[str, Any] = {"revision": revision, "overwrite": overwrite, "trust_remote_code": trust_remote_code}
    options |= {"max_shard_size": max_shard_size, "progress": terminal.progress()}
    terminal.show(unpacking.unpack(model, output, **options), json)
