"""The pipeline: one block at a time is loaded, measured, pruned, matched, run again, written and dropped.

Read this first. Peak memory is that of one block, of the calibration activations and of the statistics of the block's
inputs, whatever the depth of the model.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse import source
from llmsparse.checkpoint import CheckpointReader, CheckpointWriter, parse_size
from llmsparse.collect import Input, collect, learn_inputs
from llmsparse.errors import CheckpointError, LlmsparseError, MachineError
from llmsparse.evaluation import negative_log_likelihood
from llmsparse.matching import Match, match
from llmsparse.memory import PeakMemory
from llmsparse.model import Activations, Block
from llmsparse.output import PartialOutput
from llmsparse.planning import HEAD, Choice, Plan, make_plan, versions
from llmsparse.progress import Progress, Silent
from llmsparse.pruners import Magnitude
from llmsparse.recipe import Recipe
from llmsparse.report import BlockRecord, Report, Row
from llmsparse.stats import Statistic, combine

OUTSIDE = "outside the blocks"  # journal entry: everything that is not pruned has been copied


def prune(
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **keys: Any,
) -> Report:
    """Prune a checkpoint into a new folder, as a recipe says, or its keys: `prune(model="…", sparsity=0.7)`.

    The run writes `<output>.partial`, renamed when all is done; `resume` takes up one that was interrupted and gives
    the same bytes. Raises a LlmsparseError of one line.
    """
    progress = progress or Silent()
    torch.backends.cuda.matmul.allow_tf32 = False  # Hessians need the full fp32 mantissa
    started = time.perf_counter()
    plan = make_plan(recipe or Recipe(**keys), resume=resume, overwrite=overwrite)
    with (
        PeakMemory(plan.device) as memory,
        PartialOutput(
            plan.output, source=plan.folder, fingerprint=plan.fingerprint, resume=resume, overwrite=overwrite
        ) as partial,
        progress,
    ):
        writer = CheckpointWriter(partial.folder, plan.tensors, parse_size(plan.recipe.max_shard_size))
        if OUTSIDE not in partial.finished:
            writer.copy(plan.reader, [key for key in plan.reader.keys() if key not in plan.selected_keys])
            writer.sync()
            partial.journal(OUTSIDE, {})

        report = Report(plan.name, str(plan.output), plan.recipe.resolved(), plan.windows.protocol, versions())
        report.total_parameters = plan.total_parameters
        prune_blocks(plan, report, partial, writer, progress)
        writer.finish()

        report.warn()
        report.seconds = time.perf_counter() - started
        report.peak_memory_bytes = memory.read()
        recipe_text = plan.recipe.dump(versions() | {"calibration sha256": plan.windows.fingerprint})
        source.copy_side_files(plan.folder, partial.folder)
        source.write_side_files(partial.folder, recipe=recipe_text, report=report.stored(), card=report.card())
        check_written(plan, partial.folder, writer)
        partial.publish()
    return report


@torch.no_grad()
def prune_blocks(
    plan: Plan, report: Report, partial: PartialOutput, writer: CheckpointWriter, progress: Progress
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

    before = negative_log_likelihood(model, dense, plan.held_out) if dense else None
    if plan.choices[HEAD]:
        head = model.head()
        assert head is not None
        report.blocks.append(finish_block(head, acts, plan, partial, writer, progress))
    if before is not None and pruned:
        tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in plan.held_out)
        report.perplexity = {
            "before": math.exp(before / tokens),
            "after": math.exp(min(negative_log_likelihood(model, pruned, plan.held_out) / tokens, 700.0)),
            "windows": sum(ids.shape[0] for ids in plan.held_out),
            "seq_len": plan.held_out[0].shape[1],
            "tokens": tokens,
        }


def finish_block(
    block: Block, acts: Activations, plan: Plan, partial: PartialOutput, writer: CheckpointWriter, progress: Progress
) -> BlockRecord:
    """Leave `block` pruned, as it is on disk: pruned and written now, or read back from an interrupted run."""
    keys = sorted({choice.weight.key for choice in plan.choices[block.name]})
    if block.name in partial.finished:
        record = BlockRecord.from_json(partial.finished[block.name])
        block.stored.update(writer.read(keys))
    else:
        record = prune_block(block, acts, plan, progress)
        writer.write({key: block.stored[key] for key in keys})
        writer.sync()
        partial.journal(block.name, record.to_json())
    if keys:
        block.reload()  # what runs on is what was stored, rounded to its dtype
    return record


def prune_block(block: Block, acts: Activations, plan: Plan, progress: Progress) -> BlockRecord:
    """Prune the chosen weights of a dense block in `block.stored`, and match its output to the dense block's."""
    started = time.perf_counter()
    choices = {choice.weight.name: choice for choice in plan.choices[block.name]}
    if not choices:
        return BlockRecord(block.name, [], None, {})
    for choice in choices.values():
        if not torch.isfinite(block.view(choice.weight)).all():
            raise CheckpointError(f"{choice.weight.name} in {plan.folder} holds NaN or Inf; repair the checkpoint")
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    keep: dict[str, Tensor] = {}
    targets: list[Tensor] = []
    matching = plan.match_steps > 0 and block.name != HEAD

    def needs(entry: Input) -> type[Statistic] | None:
        return reduce(combine, (choices[weight.name].pruner.needs for weight in entry.weights))

    inputs = learn_inputs(block, acts, [choice.weight for choice in choices.values()])
    for number, group in enumerate(groups(inputs, needs, plan)):
        if number and plan.recipe.true_sequential:
            block.reload()  # later inputs see the weights pruned so far; otherwise the module stays dense
        outputs = collect(
            block,
            acts,
            group,
            needs,
            device=plan.device,
            seed=plan.recipe.seed,
            advance=progress.batches(f"calibrating {block.name}", len(acts.hidden)),
            keep_output=matching and number == 0,
        )
        targets = targets or outputs
        for entry in group:
            for weight in entry.weights:
                begun = time.perf_counter()
                row, mask = prune_weight(block, choices[weight.name], entry, plan)
                rows.append(row)
                keep[weight.name] = mask
                seconds[weight.name] = time.perf_counter() - begun
            entry.statistic = None
            entry.rows.clear()

    result: Match | None = None
    if matching:
        result = match_block(block, acts, targets, choices, keep, plan, progress)
    order = list(choices)
    rows.sort(key=lambda row: order.index(row.name))
    seconds[block.name] = time.perf_counter() - started
    return BlockRecord(block.name, rows, asdict(result) if result else None, seconds)


def groups(inputs: list[Input], needs: Callable[[Input], type[Statistic] | None], plan: Plan) -> Iterator[list[Input]]:
    """Inputs measured in one pass: as many as the memory for statistics allows; one by one when true-sequential."""
    held: list[Input] = []
    size = 0
    for entry in inputs:
        needed = needs(entry)
        bytes_needed = needed.nbytes(entry.width) if needed else 0
        if held and (plan.recipe.true_sequential or size + bytes_needed > plan.statistics_budget):
            yield held
            held, size = [], 0
        held.append(entry)
        size += bytes_needed
    yield held


def prune_weight(block: Block, choice: Choice, entry: Input, plan: Plan) -> tuple[Row, Tensor]:
    """Prune one weight in `block.stored`; returns its report row and its keep-mask, (out, in) on the CPU."""
    weight, pruner, notes = choice.weight, choice.pruner, dict[str, Any]()
    stored = block.view(weight)  # (out, in), stored dtype
    if entry.tokens == 0:
        if weight.expert is None and weight.kind != "expert":
            raise LlmsparseError(
                f"no calibration token reached {weight.name}; leave it out with --exclude {weight.name!r}"
            )
        pruner = Magnitude()
        notes["fallback"] = "magnitude: no calibration token reached this expert"

    dense = stored.to(plan.device, torch.float32, copy=True)
    generator = torch.Generator().manual_seed(plan.recipe.seed * 2**32 + zlib.crc32(weight.name.encode()))
    pruned = pruner(dense, entry.statistic, choice.pattern, generator)
    notes |= pruned.notes
    block.store(weight, pruned.weight)
    row = Row(
        name=weight.name,
        shape=weight.shape,
        method=choice.method,
        pattern=str(choice.pattern),
        sparsity_asked=choice.pattern.sparsity,
        sparsity=1 - torch.count_nonzero(block.view(weight)).item() / stored.numel(),
        error=output_error(dense, pruned.weight, entry),
        tokens=entry.tokens,
        notes=notes,
    )
    return row, pruned.keep.cpu()


def output_error(dense: Tensor, pruned: Tensor, entry: Input) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² over the sampled rows X (rows, in); NaN where no row was seen."""
    if entry.tokens == 0:
        return math.nan
    x = entry.sample.float()
    energy = (x @ dense.T).square().sum().item()
    return (x @ (dense - pruned).T).square().sum().item() / energy if energy > 0 else 0.0


def match_block(
    block: Block,
    acts: Activations,
    targets: list[Tensor],
    choices: dict[str, Choice],
    keep: dict[str, Tensor],
    plan: Plan,
    progress: Progress,
) -> Match:
    """Tune the surviving weights so that the block's output comes back to the dense one's; updates `block.stored`."""
    block.reload()
    free = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in block.stored.items()}
    for choice in choices.values():
        block.view(choice.weight, free).copy_(keep[choice.weight.name])
    movable = {name: mask for name, mask in block.in_module(free).items() if mask.any()}
    tuned, result = match(
        block,
        acts,
        targets,
        movable,
        steps=plan.match_steps,
        seed=plan.recipe.seed,
        autocast=None if plan.dtype == torch.float32 else plan.dtype,
        advance=progress.batches(f"matching {block.name}", plan.match_steps),
    )
    on_disk = block.on_disk(tuned)
    for choice in choices.values():
        values = block.view(choice.weight, on_disk)  # (out, in) fp32
        block.store(choice.weight, values * keep[choice.weight.name].to(values.device))
    return result


def check_written(plan: Plan, folder: Path, writer: CheckpointWriter) -> None:
    """Open the finished folder as any reader would and hold one block's tensors against what was written."""
    reader = CheckpointReader(folder)
    keys = plan.model.block_keys(len(plan.model.block_names) - 1)
    written = writer.read(keys)
    for key, tensor in reader.read(keys).items():
        if not torch.equal(tensor.view(torch.uint8), written[key].view(torch.uint8)):
            raise MachineError(f"{folder}: {key} does not read back as it was written; check the disk, then --resume")
    missing = set(plan.reader.keys()) ^ set(reader.keys())
    assert not missing, f"tensors missing or added: {sorted(missing)[:3]}"
