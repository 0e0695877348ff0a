"""Measure the experts of a mixture, block by block, on the model as it is: what `shrink` needs for any number of experts."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmsparse.models.streamed import Activations, Block
from llmsparse.runs.progress import Progress
from llmsparse.runs.recipe import from_arguments
from llmsparse.runs.run import Made, Run
from llmsparse.scoring.file import tensors_of
from llmsparse.scoring.plan import ScoresPlan, make_plan
from llmsparse.scoring.recipe import ScoresRecipe
from llmsparse.scoring.report import ScoredBlock, ScoresReport
from llmsparse.scoring.scores import super_experts
from llmsparse.scoring.statistics import blend
from llmsparse.scoring.watcher import SumsOfTexts, Watcher


def scores(
    recipe: ScoresRecipe | str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **keys: Any,
) -> ScoresReport:
    """Measure a mixture's experts, as a ScoresRecipe says, or a model and keys of one: `scores("…", output="s.safetensors")`.

    The run writes `<output>.partial/`, whose one file gets its name when all is done; `resume` takes up one that was
    interrupted, on a CPU to the same bytes. Raises a LlmsparseError of one line.
    """
    plan = make_plan(from_arguments(ScoresRecipe, recipe, keys), resume=resume, overwrite=overwrite)
    with Run(plan, progress, resume=resume, overwrite=overwrite) as run:
        plan = run.plan
        run.copy_the_rest()
        acts = plan.model.embed(plan.batches, plan.ranks)
        report = ScoresReport(**plan.described(), texts=plan.texts)
        last = max(plan.mixtures)
        for block in run.blocks():
            if block.index > last:
                break
            if (block.index not in plan.mixtures or run.has(block.name)) and block.index < last:
                block.run(acts, into=acts)
            if block.index in plan.mixtures:
                made = run.block(block.name, ScoredBlock, partial(measure, plan, block, acts, run.progress))
                report.blocks.append(made.record)
        return run.publish(report)


@torch.no_grad()
def measure(plan: ScoresPlan, block: Block, acts: Activations, progress: Progress) -> Made[ScoredBlock]:
    """Sums of the block's experts; takes `acts` through the block."""
    started = time.perf_counter()
    share, mixture = acts.share, plan.mixtures[block.index]
    advance = progress.batches(f"measuring {block.name}", len(acts.hidden))

    watcher = Watcher(block, mixture, plan.texts_of_batches)

    def leaf(number: int) -> list[SumsOfTexts]:
        sums = watcher.begin_sums()
        for batch in share.leaves[number]:
            place = share.place(batch)
            with watcher.watching(batch):
                acts.hidden[place] = block.call(acts, place).to(acts.hidden[place].device)
            advance()
        return [sums]

    [summed] = share.summed_for_all(leaf, SumsOfTexts.merge, [1])
    statistics = summed.cpu()
    record = ScoredBlock(
        block.name,
        mixture.experts,
        {text: int((sums.tokens == 0).sum()) for text, sums in statistics.items()},
        super_experts(blend(statistics, plan.texts)),
        time.perf_counter() - started,
    )
    return Made(tensors_of(block.name, plan.texts, statistics), record)
