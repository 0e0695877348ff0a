"""The verb that trains a factorized model."""

from __future__ import annotations

from typing import Any

import typer

from llmsparse.cli.options import Json, ModelOrRecipe, RecipeName, Restart, Resume, TuneAssignments, recipe_from, verb
from llmsparse.cli.terminal import Terminal
from llmsparse.tuning.keys import KEYS

app = typer.Typer()


@verb(app, recipe_flags=True, keys=KEYS)
def tune(
    terminal: Terminal,
    model: ModelOrRecipe = None,
    assignments: TuneAssignments = None,
    recipe: RecipeName = None,
    resume: Resume = False,
    overwrite: Restart = False,
    json: Json = False,
    **flags: Any,
) -> None:
    """Train a factorized MODEL, for a few hundred steps, to say what its dense teacher says.

    llmsparse tune ./moe --teacher meta-llama/Llama-3.2-1B --text wikitext2
    """
    from llmsparse.tuning.recipe import TuneRecipe

    chosen = recipe_from(TuneRecipe, model, assignments, recipe, flags, resume, overwrite)
    terminal.calm_libraries()
    terminal.will_write(chosen.output_folder)
    from llmsparse.tuning import pipeline

    report = pipeline.tune(chosen, resume=resume, overwrite=overwrite, progress=terminal.progress())
    return terminal.show(report, json)
