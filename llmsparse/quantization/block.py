"""One block: its inputs are measured, its weights become small integers.

The module stays dense until it is reloaded, so what is measured of later inputs is that of the dense block, on what the
blocks before it have become.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmsparse.calibration.inputs import Input, calibrate, learn_inputs
from llmsparse.calibration.matching import Match, autocast_dtype
from llmsparse.calibration.matching_loss import LogitDivergence, Loss, OutputError
from llmsparse.calibration.passes import output_error, passes
from llmsparse.errors import LlmsparseError, RecipeError
from llmsparse.formats.digits import LARGEST
from llmsparse.formats.nested import entropy_of
from llmsparse.models.streamed import HEAD, Activations, Block, StreamedModel, Weight
from llmsparse.quantization.matching import Numbers, match_numbers
from llmsparse.quantization.recipe import QuantizeRecipe
from llmsparse.quantization.report import BlockRecord, QuantizedWeight
from llmsparse.quantization.weight import START, Problem, Quantized, bits_of, parts
from llmsparse.runs.progress import Progress
from llmsparse.runs.run import Made, Run
from llmsparse.sparsity.stats import Gram, Statistic

STEPS = ".steps"  # behind an on-disk key: the steps of the numbers that stand under the key itself
UNMATCHED = "bits_unmatched"  # of a row's notes: what it took before matching
LEANING = 0.1  # bits a weight, at most, by which one makes up for what others took too much or too little


@dataclass(frozen=True)
class Choice:
    """One weight, and into how few bits it goes."""

    weight: Weight
    group: int  # columns that share a step
    largest: int | None  # |q|; None: as `bits` allow
    bits: float | None  # stored, a weight
    method: str
    whole: bool = False  # all rows share the step, too

    @property
    def sharing(self) -> int:
        """Numbers that share a step."""
        return self.group * (self.weight.shape[0] if self.whole else 1)


@dataclass(frozen=True)
class QuantizeOptions:
    """What the solver of a block is told, besides what to quantize."""

    recipe: QuantizeRecipe
    device: torch.device
    calibration_tokens: int
    statistics_budget: int  # bytes of statistics that may be held at once
    model: StreamedModel

    def loss_of(self, block: str, aims: Activations) -> Loss:
        """What matching a block makes small; behind the last one there is nothing but the head."""
        last = block == self.model.block_names[-1]
        return LogitDivergence(self.model, aims.hidden) if last else OutputError(aims.hidden)


@dataclass
class Budget:
    """Bits that are left over, or lacking, of the weights that are done; and the step that the last of them took. What is
    over of some is for others of which as many were asked: a rule has its own."""

    over: Mapping[float, float] = field(default_factory=dict[float, float])  # of those that so many bits are asked of
    step: float = START
    bits: float | None = None  # of the weight that took this step
    drift: float = 0.0  # bits a weight that matching added to the last block, and is expected to add to the next

    def target(self, bits: float, numel: int) -> float:
        """Bits a weight for the next one, of which so many were asked for, before it is matched."""
        return bits - self.drift + min(max(self.over.get(bits, 0.0) / numel, -LEANING), LEANING)

    def start(self, bits: float) -> float:
        """A step to begin the search for so many bits with: twice as large for one bit less."""
        return self.step * 2 ** ((self.bits or bits) - bits)

    def spend(self, row: QuantizedWeight, more: float = 0.0) -> None:
        """`more`: bits a weight that are still to come."""
        if row.asked is not None and row.step is not None:
            left = self.over.get(row.asked, 0.0) + (row.asked - row.bits - more) * row.numel
            self.over = {**self.over, row.asked: left}
            self.step, self.bits = row.step, row.asked

    def learn_drift(self, rows: Sequence[QuantizedWeight]) -> None:
        added = [(row.bits - row.notes[UNMATCHED]) * row.numel for row in rows if UNMATCHED in row.notes]
        self.drift = sum(added) / sum(row.numel for row in rows) if added else 0.0


def finish_block(
    block: Block,
    acts: Activations,
    aims: Activations | None,
    choices: Sequence[Choice],
    options: QuantizeOptions,
    budget: Budget,
    run: Run[Any],
) -> BlockRecord:
    """Leave `block` as it will be computed with: quantized now, or read back from an interrupted run."""

    def make() -> Made[BlockRecord]:
        return quantize_block(block, acts, choices, options, replace(budget), run.progress, aims)

    made = run.block(block.name, BlockRecord, make)
    for choice in choices:
        weight, group = choice.weight, choice.group
        numbers = Quantized(*_views(weight, made.tensors), None, {})
        dtype = block.view(weight).dtype
        block.store(weight, torch.cat([numbers.dense(group, part).to(dtype) for part in parts(len(numbers.q))]))
    block.reload(sorted({choice.weight.key for choice in choices}))
    for row in made.record.rows:
        budget.spend(row)
    budget.learn_drift(made.record.rows)
    return made.record


@torch.no_grad()
def quantize_block(
    block: Block,
    acts: Activations,
    chosen: Sequence[Choice],
    options: QuantizeOptions,
    budget: Budget,
    progress: Progress,
    aims: Activations | None = None,
) -> Made[BlockRecord]:
    """Numbers and steps of the chosen weights of a dense block, as on-disk tensors of the shapes of theirs; tuned until its
    output is `aims`, if there are any."""
    started = time.perf_counter()
    choices = {choice.weight.name: choice for choice in chosen}
    tensors: dict[str, Tensor] = {}
    rows: list[QuantizedWeight] = []
    seconds: dict[str, float] = {}
    if not choices:
        return Made({}, BlockRecord(block.name, [], {}))
    for choice in chosen:
        _make_room(block, choice, tensors)

    def needs(entry: Input) -> type[Statistic] | None:
        return Gram

    def quantize_weights(entry: Input) -> list[tuple[Quantized, QuantizedWeight, float]]:
        left, found = replace(budget), list[tuple[Quantized, QuantizedWeight, float]]()
        for weight in entry.weights:
            begun = time.perf_counter()
            made, row = _quantize(block, choices[weight.name], entry, options, left)
            left.spend(row, left.drift)
            found.append((made, row, time.perf_counter() - begun))
        entry.forget()
        return found

    inputs = learn_inputs(block, acts, [choice.weight for choice in chosen])
    for group in passes(inputs, needs, options.statistics_budget, share=acts.share):
        note = progress.batches(f"calibrating {block.name}", len(acts.hidden))
        calibrate(block, acts, group, needs, device=options.device, seed=options.recipe.seed, advance=note)
        for entry in group:  # one after the other, for what a weight leaves of the budget is the next one's
            [found] = acts.share.ranks.divided([entry], [entry.owner], quantize_weights)
            for weight, (made, row, taken) in zip(entry.weights, found, strict=True):
                q, steps = _views(weight, tensors)
                q.copy_(made.q)
                steps.copy_(made.steps)
                budget.spend(row, budget.drift)
                rows.append(row)
                seconds[weight.name] = taken
    result: Match | None = None
    if aims is not None and block.name != HEAD:
        result = _match(block, acts, options.loss_of(block.name, aims), tensors, chosen, options, progress)
        rows = [_recounted(row, choices[row.name], tensors) for row in rows]
    order = list(choices)
    rows.sort(key=lambda row: order.index(row.name))
    seconds[block.name] = time.perf_counter() - started
    return Made(tensors, BlockRecord(block.name, rows, seconds, asdict(result) if result else None))


def _match(
    block: Block,
    acts: Activations,
    loss: Loss,
    tensors: dict[str, Tensor],
    chosen: Sequence[Choice],
    options: QuantizeOptions,
    progress: Progress,
) -> Match:
    """Tune numbers and steps in `tensors` so that the block's output comes back to what it was."""
    keys = sorted({choice.weight.key for choice in chosen})
    steps = block.in_module({key: tensors[key + STEPS] for key in keys})
    numbers = {
        name: Numbers(q, steps[name]) for name, q in block.in_module({key: tensors[key] for key in keys}).items()
    }
    count, largest = options.recipe.match_steps, chosen[0].largest
    tuned, result = match_numbers(
        block,
        acts,
        loss,
        numbers,
        rate=0.0 if largest else options.recipe.rate,
        most=largest or LARGEST,
        steps=count,
        seed=options.recipe.seed,
        autocast=autocast_dtype(options.model.dtype, options.device),
        advance=progress.batches(f"matching {block.name}", count),
    )
    for key, q in block.on_disk({name: held.q for name, held in tuned.items()}).items():
        tensors[key] = q.contiguous()
    for key, held in block.on_disk({name: held.steps for name, held in tuned.items()}).items():
        tensors[key + STEPS] = held.contiguous()
    return result


def _recounted(row: QuantizedWeight, choice: Choice, tensors: dict[str, Tensor]) -> QuantizedWeight:
    """The row of a weight whose numbers have moved; its error stays that of before."""
    q, steps = _views(choice.weight, tensors)
    return replace(
        row,
        bits=bits_of(q, steps),
        entropy=entropy_of(q),
        zeros=1 - int(q.count_nonzero()) / q.numel(),
        notes=row.notes | {UNMATCHED: row.bits},
    )


def _quantize(
    block: Block, choice: Choice, entry: Input, options: QuantizeOptions, budget: Budget
) -> tuple[Quantized, QuantizedWeight]:
    """A weight as numbers and steps, and its row of the report."""
    weight, recipe = choice.weight, options.recipe
    if entry.tokens == 0 and weight.expert is None and weight.kind != "expert":
        raise LlmsparseError(f"no calibration token reached {weight.name}; leave it out with --exclude {weight.name!r}")
    stored, notes = block.view(weight), dict[str, Any]()
    dense = stored.to(options.device, torch.float32, copy=True)
    stat = entry.statistic if choice.method == "gptq" else None
    if stat is not None and entry.tokens < Gram.least_tokens(entry.width) and entry.tokens < options.calibration_tokens:
        stat, notes["fallback"] = None, f"nearest: {entry.tokens} calibration tokens reached it"
    assert stat is None or isinstance(stat, Gram)
    problem = Problem(dense, stat, choice.group, recipe.rate, recipe.damp, choice.whole)
    if problem.keep is not None:
        notes["zeros_before"] = problem.zeros
    elif recipe.values is not None and weight.kind != HEAD:
        raise RecipeError(dense_for_values(recipe, weight.name, problem.zeros))
    if choice.bits is None:
        assert choice.largest is not None
        made = problem.to_values(choice.largest)
    else:
        made = problem.to_bits(budget.target(choice.bits, dense.numel()), budget.start(choice.bits))

    def rounded(rows: slice) -> Tensor:
        return made.dense(choice.group, rows).to(stored.dtype).float()

    row = QuantizedWeight(
        name=weight.name,
        shape=weight.shape,
        bits=bits_of(made.q, made.steps),
        entropy=entropy_of(made.q),
        zeros=1 - int(made.q.count_nonzero()) / made.q.numel(),
        step=made.step,
        asked=choice.bits,
        group=choice.sharing,
        error=output_error(dense, rounded, entry, parts(len(dense))),
        tokens=entry.tokens,
        notes=notes,
    )
    return made, row


def dense_for_values(recipe: QuantizeRecipe, name: str, zeros: float) -> str:
    """What to say of a matrix without a mask."""
    return (
        f"--values {recipe.values}: {name} is a dense matrix ({zeros:.1%} zeros), and this codes what a mask leaves; "
        "prune it first, or give --bits"
    )


def _make_room(block: Block, choice: Choice, tensors: dict[str, Tensor]) -> None:
    """Numbers and steps of the on-disk tensor of a weight, laid out like it."""
    key = choice.weight.key
    if key in tensors:
        return
    tensors[key] = torch.zeros(block.stored[key].shape, dtype=torch.int8)
    tensors[key + STEPS] = torch.zeros(steps_shape(choice, tuple(block.stored[key].shape)), dtype=torch.bfloat16)


def steps_shape(choice: Choice, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the steps of an on-disk tensor: a group in the place of its columns."""
    groups = choice.weight.shape[1] // choice.group
    *leading, first, last = shape
    return (*leading, groups, last) if choice.weight.transposed else (*leading, first, groups)


def _views(weight: Weight, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, in) and (out, groups) of a weight in on-disk tensors."""
    steps = {weight.key: tensors[weight.key + STEPS]}
    return weight.view(tensors), weight.view(steps)
