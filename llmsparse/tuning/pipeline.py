"""Tune a factorized checkpoint to the dense model it came from: load both, train, write. The sibling of
`llmsparse.pipeline`; unlike there, both models are held whole, and the trained weights three times over in fp32.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError, NumericalError
from llmsparse.evaluation.perplexity import perplexity_of
from llmsparse.inference.load import load_model
from llmsparse.models.empty_model import find_blocks, quiet
from llmsparse.models.origin import copy_side_files, write_side_files
from llmsparse.pruning.pipeline import CHECKSUMS, check_written
from llmsparse.runs.memory import PeakMemory
from llmsparse.runs.partial import PartialOutput
from llmsparse.runs.progress import Progress, Silent
from llmsparse.runs.recipe import from_arguments
from llmsparse.storage.checkpoint import CheckpointWriter, parse_size
from llmsparse.storage.checksum import checksums
from llmsparse.tuning.distillation import Distillation
from llmsparse.tuning.losses import language
from llmsparse.tuning.mixture import Mixture
from llmsparse.tuning.plan import TunePlan, make_plan
from llmsparse.tuning.recipe import TuneRecipe
from llmsparse.tuning.report import TuneReport
from llmsparse.tuning.trainable import Trainable
from llmsparse.tuning.training import Training

BEFORE, TUNED = "before", "tuned weights"  # journal entries
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
    progress = progress or Silent()
    started = time.perf_counter()
    plan = make_plan(from_arguments(TuneRecipe, recipe, keys), resume=resume, overwrite=overwrite)
    with (
        PeakMemory(plan.device) as memory,
        PartialOutput(
            plan.output, source=plan.folder, fingerprint=plan.fingerprint, resume=resume, overwrite=overwrite
        ) as partial,
        progress,
    ):
        distillation = load_both(plan)
        if BEFORE not in partial.finished:
            partial.journal(
                BEFORE, held_out_losses(plan, {"teacher": distillation.teacher, "before": distillation.student})
            )
        distillation.sharpen(plan.windows.ids[plan.schedule[0][: plan.windows_at_once]].to(plan.device))
        trainable = Trainable(
            distillation.student, distillation.mixtures, plan.recipe.train, plan.recipe.lora_rank, plan.recipe.seed
        )
        training = Training(distillation, trainable, plan, partial.state / STATE_FILE)
        training.resume()
        training.run(progress)

        write(plan, trainable, partial)
        report = TuneReport.of(plan, training.history)
        report.perplexity = partial.finished[BEFORE] | held_out_losses(plan, {"after": distillation.student})
        report.loads = expert_loads(plan, distillation)
        report.warn()
        report.seconds = time.perf_counter() - started
        report.peak_memory_bytes = memory.read()
        copy_side_files(plan.folder, partial.folder)
        write_side_files(
            partial.folder,
            recipe=plan.resolved.dump(
                plan.versions | {"threads": torch.get_num_threads(), "text sha256": plan.windows.fingerprint},
                plan.output,
            ),
            report=report.stored(),
            card=report.card(),
        )
        check_written(partial.folder, plan.tensors, partial)
        partial.publish()
    return report


def load_both(plan: TunePlan) -> Distillation:
    """Student in fp32, teacher in the dtype of the products, both on the device."""
    with quiet():
        student = load_model(plan.folder, device=plan.device, dtype="float32")
        teacher = load_model(plan.teacher, device=plan.device, dtype=str(plan.dtype).removeprefix("torch."))
    one_by_one = plan.device.type == "cuda" or plan.dtype != torch.float32  # grouped products know no mixed precision
    student.set_experts_implementation("eager" if one_by_one else "grouped_mm")
    path, blocks = find_blocks(student)
    mixtures = [
        Mixture(f"{path}.{number}.mlp", blocks[number].get_submodule("mlp"), plan.container, plan.active)
        for number in plan.mixtures
    ]
    teacher.requires_grad_(False)
    return Distillation(student.eval(), teacher.eval(), mixtures, plan.mixtures)


@torch.no_grad()
def held_out_losses(plan: TunePlan, models: dict[str, Any]) -> dict[str, float]:
    """Perplexity of each model on the held-out windows. CheckpointError where it is no number."""
    found: dict[str, float] = {}
    held_out = plan.windows.held_out
    for name, model in models.items():
        total = 0.0
        for ids in held_out.to(plan.device).split(plan.windows_at_once):
            with plan.autocast():
                logits = model(input_ids=ids, use_cache=False).logits
            total += language(logits, ids).item() * len(ids)
        found[name] = perplexity_of(total, len(held_out))
        if not math.isfinite(found[name]):
            raise CheckpointError(
                f"{plan.teacher if name == 'teacher' else plan.folder}: its perplexity is {found[name]}, so it holds NaN "
                "or Inf; repair the checkpoint"
            )
    return found


@torch.no_grad()
def expert_loads(plan: TunePlan, distillation: Distillation) -> list[list[float]]:
    """Of each mixture, the share of the held-out tokens that each routed expert runs for."""
    totals = [torch.zeros(mixture.routed, dtype=torch.int64) for mixture in distillation.mixtures]
    for ids in plan.windows.held_out.to(plan.device).split(plan.windows_at_once):
        with plan.autocast():
            distillation.student(input_ids=ids, use_cache=False)
        totals = [total + load for total, load in zip(totals, distillation.loads(), strict=True)]
    return [(total / plan.windows.held_out.numel()).tolist() for total in totals]


def write(plan: TunePlan, trainable: Trainable, partial: PartialOutput) -> None:
    """The checkpoint, the trained weights in the dtype that they had; the student goes on with what was written."""
    tensors = plan.model.naming.to_disk({name: value.cpu() for name, value in trainable.values().items()})
    rounded = {key: _stored(value, plan.reader.spec(key).dtype) for key, value in tensors.items()}
    for key, value in rounded.items():
        if not torch.isfinite(value).all():
            raise NumericalError(f"{key} became NaN or Inf in {value.dtype}; lower --learning-rate")
    writer = CheckpointWriter(partial.folder, plan.tensors, parse_size(plan.recipe.max_shard_size))
    writer.copy(plan.reader, [key for key in plan.reader.keys() if key not in rounded])
    writer.write(rounded)
    writer.finish()
    partial.journal(TUNED, {CHECKSUMS: checksums(rounded)})
    values = {key: value.float() for key, value in rounded.items()}
    trainable.settle(dict(plan.model.naming.to_module(values)))


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded, and without -0.0."""
    rounded = value.to(dtype)
    return rounded.masked_fill(rounded == 0, 0.0).contiguous()
