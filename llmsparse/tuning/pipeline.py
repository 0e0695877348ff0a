"""Tune a factorized checkpoint to the dense model it came from: load both, train, write.

Unlike in other verbs both models are held whole, and the trained weights several times over in fp32: masters, two moments, and
gradients that are added up in a tree, three at most in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmsparse.runs.progress import Progress
from llmsparse.runs.recipe import from_arguments
from llmsparse.runs.run import Run
from llmsparse.tuning.distillation import load_both
from llmsparse.tuning.plan import make_plan
from llmsparse.tuning.quality import expert_loads, held_out_losses
from llmsparse.tuning.recipe import TuneRecipe
from llmsparse.tuning.report import TuneReport
from llmsparse.tuning.result import TUNED, Tuned, tuned
from llmsparse.tuning.trainable import Trainable
from llmsparse.tuning.training import Training

BEFORE = "before"  # journal entry: perplexities of the teacher and of the model as it was
STATE_FILE = "tuning.pt"


def tune(
    recipe: TuneRecipe | str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **keys: Any,
) -> TuneReport:
    """Train a factorized model to say what its dense teacher says, as a TuneRecipe says, or a model and keys of one:
    `tune("./moe", teacher="…", text="wikitext2")`.

    The run writes `<output>.partial`, renamed when all is done; `resume` takes up one that was interrupted, on a CPU to
    the same bytes. Raises a LlmsparseError of one line.
    """
    plan = make_plan(from_arguments(TuneRecipe, recipe, keys), resume=resume, overwrite=overwrite)
    with Run(plan, progress, resume=resume, overwrite=overwrite) as run:
        run.copy_the_rest()
        with plan.ranks.together():
            distillation = load_both(plan)
        models = {"teacher": distillation.teacher, "before": distillation.student}
        before = run.fact(BEFORE, lambda: held_out_losses(plan, models))
        distillation.sharpen(plan.windows.ids[plan.schedule[0][: plan.windows_at_once]].to(plan.device))
        how = (plan.recipe.train, plan.recipe.lora_rank, plan.recipe.seed)
        trainable = Trainable(distillation.student, distillation.mixtures, *how)
        training = Training(distillation, trainable, plan, run.state / STATE_FILE)
        training.resume()
        training.run(run.progress)
        written = run.block(TUNED, Tuned, lambda: tuned(plan, trainable)).tensors
        trainable.settle(dict(plan.model.naming.to_module({key: value.float() for key, value in written.items()})))

        report = TuneReport.of(plan, training.history)
        report.perplexity = before | held_out_losses(plan, {"after": distillation.student})
        report.loads = expert_loads(plan, distillation)
        return run.publish(report)
