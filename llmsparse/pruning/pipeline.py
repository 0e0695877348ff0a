"""The pipeline: one block at a time is loaded, measured, pruned, matched, run again, written and dropped.

Read this first. Peak memory is that of one block, of the calibration activations and of the statistics of the block's
inputs, whatever the depth of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.evaluation.perplexity import negative_log_likelihood, perplexity_of
from llmsparse.models.origin import copy_side_files, write_side_files
from llmsparse.models.streamed import Activations, Block
from llmsparse.packing.pack import select_packable
from llmsparse.pruning.block import prune_block
from llmsparse.pruning.plan import PrunePlan, make_plan
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.pruning.report import BlockRecord, PruneReport
from llmsparse.pruning.selection import HEAD
from llmsparse.runs.device import full_float32
from llmsparse.runs.memory import PeakMemory, release_freed
from llmsparse.runs.partial import PartialOutput
from llmsparse.runs.plan import versions
from llmsparse.runs.progress import Progress, Silent
from llmsparse.runs.recipe import from_arguments
from llmsparse.storage.checkpoint import CheckpointReader, CheckpointWriter, parse_size
from llmsparse.storage.checksum import checksums, read_checked

CHECKSUMS = "checksums"  # beside the record in the journal entry of a block
Record = TypeVar("Record")
OUTSIDE = "outside the blocks"  # journal entry: everything that is not pruned has been copied


def prune(
    recipe: PruneRecipe | str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **keys: Any,
) -> PruneReport:
    """Prune a checkpoint into a new folder, as a Recipe says, or a model and keys of one: `prune("…", sparsity=0.7)`.

    The run writes `<output>.partial`, renamed when all is done; `resume` takes up one that was interrupted and gives
    the same bytes. Format packed is made from the dense checkpoint, which lies in the run's state until then. Raises a
    LlmsparseError of one line.
    """
    progress = progress or Silent()
    started = time.perf_counter()
    plan = make_plan(from_arguments(PruneRecipe, recipe, keys), resume=resume, overwrite=overwrite)
    with (
        full_float32(),
        PeakMemory(plan.device) as memory,
        PartialOutput(
            plan.output, source=plan.folder, fingerprint=plan.fingerprint, resume=resume, overwrite=overwrite
        ) as partial,
        progress,
    ):
        folder = partial.folder if plan.recipe.format == "dense" else partial.state / "dense"
        shard_bytes = parse_size(plan.recipe.max_shard_size)
        writer = CheckpointWriter(folder, plan.tensors, shard_bytes, resuming=bool(partial.finished))
        if OUTSIDE not in partial.finished:
            writer.copy(plan.reader, [key for key in plan.reader.keys() if key not in plan.selected_keys])
            writer.sync()
            partial.journal(OUTSIDE, {})

        report = PruneReport(**plan.described(), total_parameters=plan.total_parameters)
        prune_blocks(plan, report, partial, writer, progress)
        writer.finish()

        report.warn()
        report.seconds = time.perf_counter() - started
        report.peak_memory_bytes = memory.read()
        recipe_text = plan.resolved.dump(versions() | {"calibration sha256": plan.windows.fingerprint})
        copy_side_files(plan.folder, folder)
        write_side_files(folder, recipe=recipe_text, report=report.stored(), card=report.card())
        check_written(folder, plan.tensors, partial)
        if folder != partial.folder:
            packable = select_packable(folder, plan.recipe.trust_remote_code, progress)
            names = {"model": plan.output.name, "output": str(plan.output)}
            report.packing = packable.write(partial.folder, shard_bytes, progress, **names)
            report.seconds = time.perf_counter() - started
        partial.publish()
    return report


@torch.no_grad()
def prune_blocks(
    plan: PrunePlan, report: PruneReport, partial: PartialOutput, writer: CheckpointWriter, progress: Progress
) -> None:
    """Carry three streams of activations through the blocks: calibration windows through the pruned prefix, and
    held-out windows through the pruned prefix and through the dense model, for the perplexity before and after."""
    model = plan.model
    acts = model.embed(plan.batches)
    pruned = dense = model.embed(plan.held_out) if plan.held_out else None
    progress.start(len(model.block_names))
    for index, name in enumerate(model.block_names):
        progress.block(name)
        block = model.block(index)
        if dense:
            dense = block.run(dense)
        report.blocks.append(finish_block(block, acts, plan, partial, writer, progress))
        acts = block.run(acts)
        if pruned:
            pruned = block.run(pruned)
        block.evict()
        release_freed()

    before = negative_log_likelihood(model, dense, plan.held_out) if dense else None
    if plan.choices[HEAD]:
        head = model.head()
        assert head is not None
        report.blocks.append(finish_block(head, acts, plan, partial, writer, progress))
    if before is not None and pruned:
        tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in plan.held_out)
        report.perplexity = {
            "before": perplexity_of(before, tokens),
            "after": perplexity_of(negative_log_likelihood(model, pruned, plan.held_out), tokens),
            "windows": sum(ids.shape[0] for ids in plan.held_out),
            "seq_len": plan.held_out[0].shape[1],
            "tokens": tokens,
        }


def finish_block(
    block: Block,
    acts: Activations,
    plan: PrunePlan,
    partial: PartialOutput,
    writer: CheckpointWriter,
    progress: Progress,
) -> BlockRecord:
    """Leave `block` pruned, as it is on disk: pruned and written now, or read back from an interrupted run."""
    keys = sorted({choice.weight.key for choice in plan.choices[block.name]})
    if block.name in partial.finished:
        record, expected = recall(partial, block.name, BlockRecord.from_json)
        block.stored.update(read_checked(writer, expected))
    else:
        record = prune_block(block, acts, plan, progress)
        tensors = {key: block.stored[key] for key in keys}
        writer.write(tensors)
        writer.sync()
        partial.journal(block.name, record.to_json() | {CHECKSUMS: checksums(tensors)})
    if keys:
        block.reload()  # what runs on is what was stored, rounded to its dtype
    return record


def recall(
    partial: PartialOutput, name: str, read: Callable[[dict[str, Any]], Record]
) -> tuple[Record, dict[str, str]]:
    """What the journal says of a finished block: its record, and the checksums of its tensors."""
    entry = partial.finished[name]
    try:
        return read(entry), entry[CHECKSUMS]
    except (KeyError, TypeError) as error:
        raise RecipeError(
            f"{partial.folder}: another version of llmsparse began this run, and what it noted of {name} cannot be "
            "held against what is on disk; start again with --overwrite"
        ) from error


def check_written(folder: Path, planned: Iterable[str], partial: PartialOutput) -> None:
    """Open the finished folder as any reader would and hold each finished block against its checksums."""
    reader = CheckpointReader(folder)
    for entry in partial.finished.values():
        read_checked(reader, entry.get(CHECKSUMS, {}))  # what was only copied has none
        release_freed()
    missing = set(planned) ^ set(reader.keys())
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing or were added, {min(missing)!r} among them; "
            "something else writes there; start anew with --overwrite"
        )
