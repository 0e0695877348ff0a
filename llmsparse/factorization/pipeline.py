"""Factorize a checkpoint, block by block.

Each block is calibrated on the blocks factorized before it, which are run by transformers' own code for the container,
from what was written. So a run that is resumed does what one that was never interrupted does.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from llmsparse.factorization.block import LayerRecord, factorize_block
from llmsparse.factorization.plan import describe, make_plan, spell
from llmsparse.factorization.recipe import FactorizeRecipe
from llmsparse.factorization.report import FactorizeReport
from llmsparse.models.streamed import StreamedModel
from llmsparse.runs.progress import Progress
from llmsparse.runs.recipe import from_arguments
from llmsparse.runs.run import Run


def factorize(
    recipe: FactorizeRecipe | str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **keys: Any,
) -> FactorizeReport:
    """Write a dense model as a mixture of experts, as a FactorizeRecipe says, or a model and keys of one:
    `factorize("…", experts=16)`.

    The run writes `<output>.partial`, renamed when all is done; `resume` takes up one that was interrupted, on a CPU to
    the same bytes. Raises a LlmsparseError of one line.
    """
    plan = make_plan(from_arguments(FactorizeRecipe, recipe, keys), resume=resume, overwrite=overwrite)
    with Run(plan, progress, resume=resume, overwrite=overwrite) as run:
        plan = run.plan
        run.copy_the_rest()
        mixture = StreamedModel(run.made_so_far(), device=plan.device, dtype=plan.dtype)
        streams = plan.streams(mixture)
        layout, container = describe(plan.layout), plan.container.name
        report = FactorizeReport(**plan.described(), layout=layout, experts=spell(plan.layout), container=container)
        for block in run.blocks():
            streams.through_source(block)
            if block.name in plan.targets:
                entering = (streams.calibration, streams.held_out)
                make = partial(factorize_block, block, *entering, plan.targets[block.name], plan.options)
                report.blocks.append(run.block(block.name, LayerRecord, make).record)
                run.settle()  # the mixture reads it from disk
            written = mixture.block(block.index)
            streams.through_made(written)
            written.evict()
        report.perplexity = streams.perplexity()
        return run.publish(report)
