"""The verbs that run a model, and the one that says what can run here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llmsparse.cli.options import Device, Dtype, ExpertMemory, Experts, Json, Model, Revision, TrustRemoteCode, verb
from llmsparse.cli.terminal import Terminal

app = typer.Typer()


@verb(app)
def generate(
    terminal: Terminal,
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Stop after so many tokens.")] = 64,
    backend: Annotated[
        str,
        typer.Option(metavar="auto|NAME", help="What runs packed weights; a name packs a pruned MODEL as it loads."),
    ] = "auto",
    optimize: Annotated[
        str,
        typer.Option(
            metavar="memory|speed",
            help="For long prompts memory unpacks weights at every call, speed keeps dense copies.",
        ),
    ] = "memory",
    device: Device = "auto",
    dtype: Dtype = "auto",
    experts: Experts = "auto",
    expert_memory: ExpertMemory = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Continue a text with MODEL, dense, pruned or packed; tokens per second and memory go to stderr.

    llmsparse generate ./packed --prompt "Once upon a time"
    """
    terminal.calm_libraries()
    from llmsparse.inference import generate as generation

    pieces = [prompt]  # what is not printed yet; the prompt waits until the model is loaded

    def write(text: str) -> None:
        print("".join([*pieces, text]), end="", flush=True)
        pieces.clear()

    result = generation.generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        backend=backend,
        optimize=optimize,
        device=device,
        dtype=dtype,
        experts=experts,
        expert_memory=expert_memory,
        revision=revision,
        trust_remote_code=trust_remote_code,
        write=None if json else write,
        say=None if terminal.quiet else lambda line: print(line, file=sys.stderr, flush=True),
    )
    if json:
        return terminal.show(result, True)
    print("".join(pieces))
    if not terminal.quiet:
        print(result.summary(), file=sys.stderr)


@verb(app)
def doctor(terminal: Terminal, json: Json = False) -> None:
    """Show versions, devices, and each backend: usable here, or why not."""
    terminal.calm_libraries()
    from llmsparse.benchmark.doctor import diagnose

    terminal.show(diagnose(), json)


@app.command("run", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- PROGRAM [ARGUMENTS]", help="A command, or python FILE.", show_default=False),
    ] = None,
) -> None:
    """Run a Python PROGRAM that loads models by name, and let it load packed ones.

    llmsparse run -- lm_eval --model hf --model_args pretrained=./packed --tasks arc_easy
    """
    from llmsparse.cli.program import run_program

    raise typer.Exit(run_program(words or []))
