"""Factorize a checkpoint, block by block: the sibling of `llmsparse.pipeline`.

Each block is calibrated on the blocks factorized before it, which are run by transformers' own code for the container,
from what was written. So a run that is resumed does what one that was never interrupted does.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from llmsparse.evaluation.perplexity import negative_log_likelihood, perplexity_of
from llmsparse.factorization.block import LayerRecord, factorize_block
from llmsparse.factorization.plan import FactorizePlan, describe, make_plan, spell
from llmsparse.factorization.recipe import FactorizeRecipe
from llmsparse.factorization.report import FactorizeReport
from llmsparse.models.origin import copy_side_files, write_side_files
from llmsparse.models.streamed import StreamedModel
from llmsparse.pruning.pipeline import CHECKSUMS, OUTSIDE, check_written, recall
from llmsparse.runs.device import full_float32
from llmsparse.runs.memory import PeakMemory, release_freed
from llmsparse.runs.partial import PartialOutput
from llmsparse.runs.plan import versions
from llmsparse.runs.progress import Progress, Silent
from llmsparse.runs.recipe import from_arguments
from llmsparse.storage.checkpoint import CheckpointReader, CheckpointWriter, parse_size
from llmsparse.storage.checksum import checksums, read_checked
from llmsparse.storage.disk import disk_error


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

    The run writes `<output>.partial`, renamed when all is done; `resume` takes up one that was interrupted and gives
    the same bytes. Raises a LlmsparseError of one line.
    """
    progress = progress or Silent()
    started = time.perf_counter()
    plan = make_plan(from_arguments(FactorizeRecipe, recipe, keys), resume=resume, overwrite=overwrite)
    with (
        full_float32(),
        PeakMemory(plan.device) as memory,
        PartialOutput(
            plan.output, source=plan.folder, fingerprint=plan.fingerprint, resume=resume, overwrite=overwrite
        ) as partial,
        progress,
    ):
        copy_side_files(plan.folder, partial.folder)
        _write_config(plan, partial.folder)
        shard_bytes = parse_size(plan.recipe.max_shard_size)
        writer = CheckpointWriter(partial.folder, plan.tensors, shard_bytes, resuming=bool(partial.finished))
        if OUTSIDE not in partial.finished:
            writer.copy(plan.reader, plan.copied)
            writer.copy(plan.reader, plan.untied, named=plan.untied)
            writer.write({key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in plan.zeros.items()})
            writer.sync()
            partial.journal(OUTSIDE, {})

        report = FactorizeReport(
            **plan.described(),
            layout=describe(plan.layout),
            experts=spell(plan.layout),
            container=plan.container.name,
        )
        factorize_blocks(plan, report, partial, writer, progress)
        writer.finish()

        report.warn()
        report.seconds = time.perf_counter() - started
        report.peak_memory_bytes = memory.read()
        recipe_text = plan.resolved.dump(versions() | {"calibration sha256": plan.windows.fingerprint})
        write_side_files(partial.folder, recipe=recipe_text, report=report.stored(), card=report.card())
        check_written(partial.folder, plan.tensors, partial)
        partial.publish()
    return report


@torch.no_grad()
def factorize_blocks(
    plan: FactorizePlan, report: FactorizeReport, partial: PartialOutput, writer: CheckpointWriter, progress: Progress
) -> None:
    """Carry activations through the factorized blocks, and held-out windows through these and the dense ones."""
    dense = plan.model
    made = StreamedModel(CheckpointReader(partial.folder), device=plan.device, dtype=plan.dtype)
    acts, made_acts = dense.embed(plan.batches), made.embed(plan.batches)  # the same, but for how blocks are called
    held = made_held = before = None
    if plan.held_out:
        held, made_held = dense.embed(plan.held_out), made.embed(plan.held_out)
        before = held
    progress.start(len(dense.block_names))
    for index, name in enumerate(dense.block_names):
        progress.block(name)
        done = name in partial.finished
        if name in plan.targets and done:
            record, expected = recall(partial, name, LayerRecord.from_json)
            read_checked(writer, expected)  # what `made` will run
            report.blocks.append(record)
        if before or (name in plan.targets and not done):
            block = dense.block(index)
            if before:
                before = block.run(before)
            if name in plan.targets and not done:
                tensors, record = factorize_block(block, acts, held, plan)
                writer.write(tensors)
                writer.sync()
                partial.journal(name, record.to_json() | {CHECKSUMS: checksums(tensors)})
                report.blocks.append(record)
            block.evict()

        block = made.block(index)
        acts = acts.like(block.run(made_acts.like(acts.hidden)).hidden)
        if held and made_held:
            held = held.like(block.run(made_held.like(held.hidden)).hidden)
        block.evict()
        release_freed()
    if before and held:
        report.perplexity = {
            "before": _perplexity(dense, before, plan),
            "after": _perplexity(made, held, plan),
            "windows": sum(ids.shape[0] for ids in plan.held_out),
            "seq_len": plan.held_out[0].shape[1],
            "tokens": _tokens(plan),
        }


def _perplexity(model: StreamedModel, acts: Any, plan: FactorizePlan) -> float:
    return perplexity_of(negative_log_likelihood(model, acts, plan.held_out), _tokens(plan))


def _tokens(plan: FactorizePlan) -> int:
    return sum(ids.shape[0] * (ids.shape[1] - 1) for ids in plan.held_out)


def _write_config(plan: FactorizePlan, folder: Path) -> None:
    try:
        plan.config.save_pretrained(folder)
    except OSError as error:
        raise disk_error(folder / "config.json", error) from error
