"""The pipeline: one block at a time is loaded, measured, pruned, matched, run again, written and dropped.

Read this first. Peak memory is that of two or three blocks (the next one is read, the last one written meanwhile), of the
calibration activations and of the statistics of the block's inputs, whatever the depth of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmsparse.models.streamed import HEAD
from llmsparse.pruning.allocation.survey import allocate, with_patterns
from llmsparse.pruning.block import finish_block
from llmsparse.pruning.packed import packing
from llmsparse.pruning.permutation.confirm import confirmed
from llmsparse.pruning.plan import make_plan
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.pruning.report import PruneReport
from llmsparse.runs.progress import Progress
from llmsparse.runs.recipe import from_arguments
from llmsparse.runs.run import Run


def prune(
    recipe: PruneRecipe | str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **keys: Any,
) -> PruneReport:
    """Prune a checkpoint into a new folder, as a PruneRecipe says, or a model and keys of one: `prune("…", sparsity=0.7)`.

    The run writes `<output>.partial`, renamed when all is done; `resume` takes up one that was interrupted, on a CPU to
    the same bytes. Format packed is made from the dense checkpoint, which lies in the run's state until then. Raises a
    LlmsparseError of one line.
    """
    plan = make_plan(from_arguments(PruneRecipe, recipe, keys), resume=resume, overwrite=overwrite)
    with Run(plan, progress, resume=resume, overwrite=overwrite, survey=confirmed) as run:
        plan = run.plan
        run.copy_the_rest()
        to_head = bool(plan.choices[HEAD])
        allocated = allocate(run)
        choices = with_patterns(plan.choices, allocated)
        streams = plan.streams(to_head=to_head, aims=plan.match_steps > 0)
        report = PruneReport(**plan.described(), total_parameters=plan.total_parameters, allocated=allocated)
        for block in run.blocks(head=to_head):
            streams.through_source(block)
            made = finish_block(block, streams.calibration, streams.aims, choices[block.name], plan.options, run)
            report.blocks.append(made)
            streams.through_made(block)
        report.perplexity = streams.perplexity()
        return run.publish(report, packing(plan, report, run.progress))
