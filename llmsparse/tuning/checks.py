"""What is refused before anything is trained: models that do not belong together, text that is too short."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsparse.errors import CalibrationError, CheckpointError, RecipeError
from llmsparse.factorization.containers import CONTAINERS, MIXTURE_KEYS

if TYPE_CHECKING:
    from llmsparse.tuning.plan import TunePlan

SAME = {"vocab_size": "vocabulary", "num_hidden_layers": "depth", "hidden_size": "hidden width"}
AS_FACTORIZED = {"n_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}  # where a config has the key


def check_student(config: Any, where: str) -> None:
    """CheckpointError, in one line, for any but a factorized model."""
    kind = config.model_type
    if kind not in CONTAINERS:
        if any(getattr(config, key, None) for key in MIXTURE_KEYS):
            raise CheckpointError(f"{where}: {kind} is not what factorize writes: {', '.join(CONTAINERS)}")
        raise CheckpointError(
            f"{where}: {kind} is no mixture of experts; make it one first: llmsparse factorize {where} -o DIR"
        )
    for key, wanted in AS_FACTORIZED.items():
        if getattr(config, key, wanted) != wanted:
            raise CheckpointError(
                f"{where}: {key} is {getattr(config, key)}, where factorize writes {wanted}; "
                "only what it has written can be tuned"
            )


def check_teacher(config: Any, teacher: Any, where: str) -> None:
    """CheckpointError for a teacher whose shape differs from the model's, or that is itself a mixture."""
    if any(getattr(teacher, key, None) for key in MIXTURE_KEYS):
        raise CheckpointError(f"--teacher {where}: is a mixture of experts; give the dense model that it was made from")
    for key, word in SAME.items():
        got, wanted = getattr(teacher, key, None), getattr(config, key)
        if got != wanted:
            raise CheckpointError(
                f"--teacher {where}: {word} is {got}, and the model's {wanted}; the teacher is the dense model that it "
                "was made from, or one of the same vocabulary, depth and hidden width"
            )


def check_router(plan: TunePlan) -> None:
    """RecipeError where only routers would be trained, and have nothing to decide."""
    key = next(key for key in plan.reader.keys() if key.endswith("." + plan.container.router))
    weights = plan.recipe.weights
    routers_only = plan.recipe.train == "router" or not (weights["kl"] or weights["layer"] or weights["language"])
    if routers_only and plan.active == plan.reader.spec(key).shape[0]:
        raise RecipeError(
            f"{plan.recipe.model}: every routed expert runs for every token, so its routers have nothing to learn; use "
            "--train experts with its usual weights"
        )


def check_text(plan: TunePlan) -> None:
    """CalibrationError for a text of less than a step, or with nothing to hold out."""
    count, held = len(plan.windows.ids), len(plan.windows.held_out)
    if count < plan.batch_size or not held:
        most = f", or --batch-size {count} or less" if held else ""
        raise CalibrationError(
            f"{plan.recipe.text}: {count} windows of {plan.seq_len} tokens to train on and {held} to measure on, wanted "
            f"{plan.batch_size} for a step and 1; give more text, or a shorter --seq-len{most}"
        )
