"""What a quantization will do, decided and checked before a byte is written."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from llmsparse.calibration.selection import matching_weights
from llmsparse.errors import RecipeError
from llmsparse.models.prunable import refuse_flat_experts, refuse_shared_blocks, refuse_stored
from llmsparse.models.streamed import HEAD, StreamedModel, Weight
from llmsparse.packing.values import LARGEST
from llmsparse.quantization.block import STEPS, Choice, QuantizeOptions, dense_for_values, steps_shape
from llmsparse.quantization.recipe import QuantizeRecipe, Rule
from llmsparse.quantization.weight import PART, TRIED_ROWS, Problem, bits_of
from llmsparse.runs.joint import joint
from llmsparse.runs.memory import available_bytes, freed_bytes
from llmsparse.runs.opening import OpenedModel, fetched, open_model, read_windows
from llmsparse.runs.partial import held_bytes
from llmsparse.runs.plan import RunPlan
from llmsparse.runs.rules import check_rules, rule_for
from llmsparse.sparsity.stats import Gram
from llmsparse.storage.disk import check_room

LEAST_CODE = 0.4  # bits a number, where next to all are 0
STATISTICS_SHARE = 0.4  # of the memory that is free, for statistics held together
TUNED = 9  # copies of a block's weights in fp32 while they are matched: behind the rounding, rounded, gradient, Adam's two, the best
BACKWARD = 4  # of what running a block takes, with all that is kept for the way back
COPIES = 8  # of a weight in fp32 while its step is searched: itself, lost, what is now, numbers, quotients, thresholds


@dataclass(frozen=True, kw_only=True)
class QuantizePlan(RunPlan[QuantizeRecipe]):
    """A quantization that has passed every check that needs no calibration."""

    choices: dict[str, list[Choice]]  # block name → what is quantized in it
    bits: float  # stored, a weight that is quantized, the head aside, as far as can be known now
    head_bits: float  # stored, a weight of the head, likewise

    @cached_property
    def selected(self) -> dict[str, Choice]:
        """On-disk key → one of the choices that it holds."""
        return {choice.weight.key: choice for choices in self.choices.values() for choice in choices}

    @cached_property
    def copied(self) -> list[str]:
        return [key for key in self.reader.keys() if key not in self.selected]

    @cached_property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Of what the packed folder is made from: numbers in the place of weights, and their steps."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for key in self.reader.keys():
            spec, choice = self.reader.spec(key), self.selected.get(key)
            found[key] = (spec.shape, spec.dtype if choice is None else torch.int8)
            if choice is not None:
                found[key + STEPS] = (steps_shape(choice, spec.shape), torch.bfloat16)
        return found

    @property
    def staging(self) -> str:
        return "numbers"

    @property
    def quantized_parameters(self) -> int:
        return sum(math.prod(self.reader.spec(key).shape) for key in self.selected)

    @property
    def bytes_to_write(self) -> int:
        kept = sum(spec.end - spec.begin for spec in map(self.reader.spec, self.copied))
        head = sum(math.prod(choice.weight.shape) for choice in self.choices[HEAD])
        return kept + round((self.bits * (self.quantized_parameters - head) + self.head_bits * head) / 8)

    @cached_property
    def options(self) -> QuantizeOptions:
        """What the solver of a block is told; the budget is that of the moment when it is first asked for."""
        budget = int(STATISTICS_SHARE * available_bytes(self.device, self.ranks.local_size))
        return QuantizeOptions(self.recipe, self.device, self.windows.ids.numel(), budget, self.model)

    def memory_bytes(self) -> int:
        """The process, activations, three blocks, statistics of one, and the search for the step of its largest weight."""
        keys = [self.model.block_keys(index) for index in range(len(self.model.block_names))]
        blocks = [sum(self.reader.spec(key).end - self.reader.spec(key).begin for key in block) for block in keys]
        widths = {(choice.weight.slot, choice.weight.shape[1]) for some in self.choices.values() for choice in some}
        squares = [Gram.nbytes(width) for _, width in widths]
        tokens = self.windows.ids.numel() + 2 * self.windows.held_out.numel()
        acts = tokens * self.model.hidden_size * self.dtype.itemsize
        statistics = max(min(sum(squares), self.options.statistics_budget), max(squares)) + 3 * max(squares)
        running = 4 * self.batches[0].numel() * 4 * max(max(c.weight.shape) for c in self.selected.values())
        work = max(*map(_searching, self.selected.values()), running)
        if self.recipe.match_steps:
            matched = max(sum(math.prod(c.weight.shape) for c in some) for some in self.choices.values())
            acts += acts // 2  # what the block gave before
            work = max(work, 4 * TUNED * matched + BACKWARD * running)
        heads = sum(self.model.bytes_of(choice.weight.key) for choice in self.choices[HEAD])
        return (
            self.footprint
            + acts
            + 4 * max(*blocks, heads)
            + freed_bytes(self.device, max(*blocks, heads))
            + statistics
            + work
        )

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {
            "bits": self.bits,
            "method": self.recipe.method,
            "weights": [
                {"name": c.weight.name, "shape": c.weight.shape, "group": c.sharing, "bits": c.bits, "method": c.method}
                for choices in self.choices.values()
                for c in choices
            ],
            "parameters_to_quantize": self.quantized_parameters,
        }

    def rows(self, plan: dict[str, Any]) -> dict[str, str]:
        return {
            "model": f"{plan['model']}, {plan['blocks']} blocks",
            "output": plan["output"],
            "quantize": f"{len(plan['weights'])} weights, {plan['parameters_to_quantize']:,} parameters, by {plan['method']} "
            f"to {self.recipe.values or 'about'} {plan['bits']:.2f} bits each",
        }


@joint
def make_plan(
    recipe: QuantizeRecipe, *, resume: bool = False, overwrite: bool = False, download: bool = True
) -> QuantizePlan:
    """Resolve and check everything a run needs, from headers and shapes, then read the calibration text; of a sparse model
    whose values are coded also its first block, if it is here."""
    opened = open_model(recipe, resume=resume, overwrite=overwrite)
    choices = choose_weights(recipe, opened)
    if recipe.values is None:
        bits = _mean_bits([choice for some in choices.values() for choice in some if choice.bits is not None])
    else:
        bits = 8.0 if opened.origin.absent else _bits_of_values(recipe, opened, choices)
    staged = sum(math.prod(c.weight.shape) for some in choices.values() for c in some)
    check_room(opened.output, opened.reader.nbytes + 2 * staged, held_bytes(opened.output))
    windows = read_windows(opened, recipe.calibration_samples)
    head = _bits_of_head(recipe, opened, choices[HEAD])
    return fetched(QuantizePlan(**opened.fields, windows=windows, choices=choices, bits=bits, head_bits=head), download)


def choose_weights(recipe: QuantizeRecipe, opened: OpenedModel[QuantizeRecipe]) -> dict[str, list[Choice]]:
    """Which weights of each block are quantized, and how; the output head stands under its own name.

    CheckpointError for a model whose weights cannot be taken one by one, RecipeError for a choice that cannot be.
    """
    model = opened.model
    refuse_shared_blocks(model)
    refuse_flat_experts(model)
    blocks: dict[str, list[Weight]] = {name: model.weights(i) for i, name in enumerate(model.block_names)}
    weights = [weight for members in blocks.values() for weight in members]
    globs = {"only": recipe.only, "include": recipe.include, "exclude": recipe.exclude}
    selected = matching_weights(weights, **globs, tied=model.tied_head, verb="quantize")
    names = {weight.name for weight in selected}
    check_rules(recipe.rules, names)
    choices = {
        block: [_choice(recipe, weight) for weight in members if weight.name in names]
        for block, members in blocks.items()
    }
    choices[HEAD] = _head(recipe, model)
    chosen = [choice.weight for some in choices.values() for choice in some]
    refuse_stored(model.folder, ((weight.key, model.dtype_of(weight)) for weight in chosen))
    _refuse_parts(model, chosen)
    _refuse_unlike(model, [choice for some in choices.values() for choice in some])
    for choice in (choice for some in choices.values() for choice in some):
        least = LEAST_CODE + 16 / choice.sharing
        if choice.bits is not None and choice.bits < least:
            raise RecipeError(
                f"{_said(recipe, choice.weight, 'bits')}: {choice.weight.name} takes at least {least:.2f} bits a weight, "
                f"{16 / choice.sharing:.2f} of them for a step of 16 bits every {choice.sharing} columns; "
                "give more bits, or a larger --group"
            )
    return choices


def _mean_bits(chosen: list[Choice]) -> float:
    """Of the weights that bits are asked of."""
    numels = [math.prod(choice.weight.shape) for choice in chosen]
    return sum((choice.bits or 0) * numel for choice, numel in zip(chosen, numels, strict=True)) / sum(numels)


def _searching(choice: Choice) -> int:
    """Bytes in which the numbers of a weight are found: all at once, or of a tall one of fixed numbers part by part."""
    rows, width = choice.weight.shape
    at_once = rows if choice.largest is None else min(rows, PART)
    whole = 4 * rows * width if at_once < rows else 0
    return 4 * COPIES * at_once * width + whole


def _choice(recipe: QuantizeRecipe, weight: Weight) -> Choice:
    width, rule = weight.shape[1], rule_for(recipe.rules, weight.name) or Rule(match="*")
    given = recipe.group if rule.group is None else rule.group
    group = width if given in ("row", "matrix") else given
    if width % group:
        raise RecipeError(
            f"{_said(recipe, weight, 'group')}: {weight.name} has {width} inputs, which {group} does not divide; use a group "
            "that does, or row"
        )
    largest = None if recipe.values is None else LARGEST[recipe.values]
    whole = given == "matrix" and weight.slot[1] is None  # experts lie in one tensor, where every row has its step
    return Choice(weight, group, largest, rule.bits or recipe.bits, rule.method or recipe.method, whole)


def _said(recipe: QuantizeRecipe, weight: Weight, what: Literal["bits", "group"]) -> str:
    """Where this setting of a weight comes from: the option, or the rule that gives it."""
    rule = rule_for(recipe.rules, weight.name)
    own = None if rule is None else getattr(rule, what)
    if rule is None or own is None:
        return f"--{what} {getattr(recipe, what)}"
    return f"rules[{recipe.rules.index(rule)}], {what} {own}"


def _head(recipe: QuantizeRecipe, model: StreamedModel) -> list[Choice]:
    if recipe.head_bits is None:
        return []
    largest = 2 ** (recipe.head_bits - 1) - 1
    return [Choice(weight, weight.shape[1], largest, None, recipe.method) for weight in model.head_weights()]


def _refuse_parts(model: StreamedModel, chosen: list[Weight]) -> None:
    """RecipeError where only some of the tensors are chosen that transformers holds as one."""
    keys = {weight.key for weight in chosen}
    for group in model.naming.groups.values():
        left = [key for key in group.keys if key not in keys]
        if left and len(left) < len(group.keys):
            raise RecipeError(
                f"{left[0].removesuffix('.weight')} is one tensor with others in the model ({group.target}), and these are "
                "quantized; choose all of them with --only and --exclude, or none"
            )


def _refuse_unlike(model: StreamedModel, chosen: list[Choice]) -> None:
    """RecipeError where weights that transformers holds as one tensor, and that are coded as one, get unlike groups or bits."""
    held = {key: group.target for group in model.naming.groups.values() for key in group.keys}
    firsts: dict[str, Choice] = {}
    for choice in chosen:
        target = held.get(choice.weight.key, choice.weight.key)
        first = firsts.setdefault(target, choice)
        for said, one, other in (
            ("steps for {} and {} numbers", first.sharing, choice.sharing),
            ("{:g} and {:g} bits", first.bits, choice.bits),
        ):
            if one != other:
                raise RecipeError(
                    f"{first.weight.name} and {choice.weight.name} are one tensor in the model ({target}), and rules give "
                    f"them {said.format(one, other)}; give both the same"
                )


def _bits_of_values(
    recipe: QuantizeRecipe, opened: OpenedModel[QuantizeRecipe], choices: dict[str, list[Choice]]
) -> float:
    """Stored bits a weight of the values in the first block; RecipeError where it has no mask."""
    bits = numel = 0.0
    first = next(some for some in choices.values() if some)
    for choice in first:
        tensors = opened.reader.read([choice.weight.key])
        problem = Problem(choice.weight.view(tensors).float(), None, choice.group, recipe.rate, recipe.damp)
        if problem.keep is None:
            raise RecipeError(dense_for_values(recipe, choice.weight.name, problem.zeros))
        assert choice.largest is not None
        made, count = problem.to_values(choice.largest), problem.weight.numel()
        bits, numel = bits + bits_of(made.q, made.steps) * count, numel + count
    return bits / numel


def _bits_of_head(recipe: QuantizeRecipe, opened: OpenedModel[QuantizeRecipe], chosen: list[Choice]) -> float:
    """Stored bits a weight of the head, by some of its rows; what was asked for while it is not here."""
    if not chosen or opened.origin.absent:
        return float(recipe.head_bits or 0)
    [choice] = chosen
    whole = choice.weight.view(opened.reader.read([choice.weight.key]))
    rows = torch.linspace(0, len(whole) - 1, min(len(whole), TRIED_ROWS)).long()
    problem = Problem(whole[rows].float(), None, choice.group, recipe.rate, recipe.damp)
    assert choice.largest is not None
    made = problem.to_values(choice.largest)
    return bits_of(made.q, made.steps)
