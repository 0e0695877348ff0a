"""One block at a time is loaded, measured, and run with its rules, so that the next one sees what they leave."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from llmsparse.cutting.block import CutBlock, choose
from llmsparse.cutting.plan import make_plan
from llmsparse.cutting.recipe import ActivationsRecipe
from llmsparse.cutting.report import ActivationsReport
from llmsparse.cutting.writing import write_thresholds
from llmsparse.models.cut_block import cutting, rules_of
from llmsparse.runs.progress import Progress
from llmsparse.runs.recipe import from_arguments
from llmsparse.runs.run import Run


def activations(
    recipe: ActivationsRecipe | str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **keys: Any,
) -> ActivationsReport:
    """Choose what a model leaves out of its activations, as an ActivationsRecipe says, or a model and keys of one:
    `activations("…", sparsity=0.5)`. The new folder holds the same weights.

    The run writes `<output>.partial`, renamed when all is done; `resume` takes up one that was interrupted, on a CPU to
    the same bytes. Raises a LlmsparseError of one line.
    """
    plan = make_plan(from_arguments(ActivationsRecipe, recipe, keys), resume=resume, overwrite=overwrite)
    with Run(plan, progress, resume=resume, overwrite=overwrite) as run:
        plan = run.plan
        run.copy_the_rest()
        streams = plan.streams()
        report = ActivationsReport(**plan.described(), left_whole=plan.left_whole)
        for block in run.blocks():
            streams.through_source(block)
            weights, note = plan.weights[block.name], run.progress.batches
            find = partial(choose, block, streams.calibration, weights, plan.recipe, note)
            made = CutBlock.from_json(run.fact(block.name, lambda find=find: find().to_json()))
            with cutting(block.module, rules_of(made.thresholds(plan.recipe), block.name, block.module)):
                streams.through_made(block)
            report.blocks.append(made)
        report.perplexity = streams.perplexity()
        with run.ranks.together():
            if run.ranks.first:
                write_thresholds(run.folder, report.thresholds())
        return run.publish(report)
