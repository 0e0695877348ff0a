"""Shrink a checkpoint, block by block.

A block is loaded whole, watched while the calibration batches run through it, cut by every reduction, and what is left is
fitted to what the whole one did (`block.py`). What a reduction is stands in `reduction.py`; those there are, in
`reductions.py`. What was made is run by transformers' own code for the smaller config, from what was written, so a run
that is resumed does what one that was never interrupted does.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from llmsparse.models.streamed import StreamedModel
from llmsparse.runs.progress import Progress
from llmsparse.runs.recipe import from_arguments
from llmsparse.runs.run import Run
from llmsparse.shrinking.block import BlockRecord, shrink_block
from llmsparse.shrinking.plan import make_plan, surveyed
from llmsparse.shrinking.recipe import ShrinkRecipe
from llmsparse.shrinking.report import ShrinkReport
from llmsparse.storage.heap import release_freed


def shrink(
    recipe: ShrinkRecipe | str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **keys: Any,
) -> ShrinkReport:
    """Write a smaller model of the same kind, as a ShrinkRecipe says, or a model and keys of one:
    `shrink("…", experts="75%")`.

    The run writes `<output>.partial`, renamed when all is done; `resume` takes up one that was interrupted, on a CPU to
    the same bytes. Raises a LlmsparseError of one line.
    """
    planned = make_plan(from_arguments(ShrinkRecipe, recipe, keys), resume=resume, overwrite=overwrite)
    with Run(planned, progress, resume=resume, overwrite=overwrite, survey=surveyed) as run:
        plan = run.plan
        run.copy_the_rest()
        reader = run.made_so_far()
        trusted = plan.trust_remote_code
        made = StreamedModel(reader, device=plan.device, dtype=plan.dtype, trust_remote_code=trusted)
        onwards = plan.recipe.one_pass  # whole blocks hand calibration on to whole blocks
        through_made = plan.watches and (plan.fits or not onwards)
        streams = plan.streams(made, calibration=through_made, aims=plan.aims)
        watched = plan.model.embed(plan.batches, plan.ranks) if onwards and plan.watches else streams.calibration
        entering = streams.calibration_as_made
        report = ShrinkReport(**plan.described(), parameters=plan.total_parameters, reductions=plan.reductions)
        for block in run.blocks():
            streams.through_source(block)
            target = plan.target(block.index)
            if onwards and (target is None or run.has(block.name)):
                block.run(watched, into=watched)
            if target is None:
                continue
            work = partial(
                shrink_block, block, target, made, watched, entering, plan.options, run.progress, onwards, streams.aims
            )
            found = run.block(block.name, BlockRecord, work)
            report.blocks.append(found.record)
            if streams.flow:
                written = made.block(target, found.tensors)
                streams.through_made(written)
                written.evict()
            release_freed()
        report.perplexity = streams.perplexity()
        return run.publish(report)
