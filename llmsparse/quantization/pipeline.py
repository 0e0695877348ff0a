"""The pipeline: one block at a time is loaded, measured, quantized, run again, written and dropped; then all is packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmsparse.models.streamed import HEAD
from llmsparse.quantization.block import Budget, finish_block
from llmsparse.quantization.packed import packing
from llmsparse.quantization.plan import make_plan
from llmsparse.quantization.recipe import QuantizeRecipe
from llmsparse.quantization.report import QuantizeReport
from llmsparse.runs.progress import Progress
from llmsparse.runs.recipe import from_arguments
from llmsparse.runs.run import Run


def quantize(
    recipe: QuantizeRecipe | str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **keys: Any,
) -> QuantizeReport:
    """Quantize a checkpoint into a new packed folder, as a QuantizeRecipe says, or a model and keys of one:
    `quantize("…", bits=2.5)`.

    The run writes `<output>.partial`, renamed when all is done; `resume` takes up one that was interrupted, on a CPU to
    the same bytes. The numbers, a byte a weight, lie in the run's state until then. Raises a LlmsparseError of one line.
    """
    plan = make_plan(from_arguments(QuantizeRecipe, recipe, keys), resume=resume, overwrite=overwrite)
    with Run(plan, progress, resume=resume, overwrite=overwrite) as run:
        plan = run.plan
        run.copy_the_rest()
        to_head = bool(plan.choices[HEAD])
        streams = plan.streams(to_head=to_head, aims=plan.recipe.match_steps > 0)
        report, budget = QuantizeReport(**plan.described()), Budget()
        for block in run.blocks(head=to_head):
            streams.through_source(block)
            choices = plan.choices[block.name]
            report.blocks.append(
                finish_block(block, streams.calibration, streams.aims, choices, plan.options, budget, run)
            )
            streams.through_made(block)
        report.perplexity = streams.perplexity()
        return run.publish(report, packing(plan, report, run.progress))
