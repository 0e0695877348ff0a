"""Fewer channels in every FFN, also in those of experts: those that add least to its output go, the down projection is fitted.

Which numbers of config.json are widths of FFNs is found out: those that are the input of a matrix, and with which that input
and the outputs of its neighbours get shorter, and nothing else.
"""

from __future__ import annotations

from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.models.naming import owner
from llmsparse.shrinking.narrowing import Axis, UnfitError, Unit, reader
from llmsparse.shrinking.recipe import ShrinkRecipe, amount_of, refuse_amount
from llmsparse.shrinking.reduction import Reduction, Source
from llmsparse.shrinking.shapes import block_shapes, narrower_blocks
from llmsparse.shrinking.width import Narrower, laid_out

STEP, SMALL_STEP = 64, 8  # widths are rounded to a multiple of it
SMALL = 512  # FFNs narrower than that to the smaller one


class Channels(Narrower):
    """Narrower FFNs."""

    name = "ffn"
    pieces = "FFN channels"


def plan(recipe: ShrinkRecipe, source: Source) -> Reduction:
    """The FFNs of a model with as many channels as the recipe says. RecipeError or CheckpointError where that cannot be."""
    assert recipe.ffn is not None
    amount, widths = recipe.ffn, find_widths(source)
    if len(set(widths.values())) > 1 and not amount.endswith("%"):
        spelled = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise RecipeError(f"--ffn {amount}: there are FFNs of several widths ({spelled}); give a share such as 75%")
    kept = {name: amount_of(amount, width, step_of(width)) for name, width in widths.items()}
    fields = {name: count for name, count in kept.items() if count < widths[name]}
    if not fields:
        name, width = max(widths.items(), key=lambda item: item[1])
        refuse_amount("ffn", amount, kept[name], width)
    units = find_units(source, narrower_blocks(source, fields))
    return Channels(source.model, fields, units, recipe.refit)


def find_widths(source: Source) -> dict[str, int]:
    """The numbers in the config that are widths of FFNs. CheckpointError where there is none."""
    found: dict[str, int] = {}
    why = "no number in its config.json says how wide they are"
    for name, width in _candidates(source).items():
        try:
            find_units(
                source, narrower_blocks(source, {name: width - 1 if width < 2 * SMALL_STEP else width - SMALL_STEP})
            )
            found[name] = width
        except UnfitError as error:
            why = f"{name}: {error}"
    if not found:
        raise CheckpointError(
            f"{source.where}: the FFNs of {source.model.config.model_type} cannot be made narrower: {why}"
        )
    return found


def step_of(width: int) -> int:
    """What widths are rounded to a multiple of: what kernels like, and finer for small ones."""
    return STEP if width >= SMALL and width % STEP == 0 else SMALL_STEP


def _candidates(source: Source) -> dict[str, int]:
    """Numbers in the config that are the inputs of some matrix that gives a hidden state."""
    hidden = source.model.hidden_size
    inputs = {
        weight.shape[1]
        for index in range(len(source.model.block_names))
        for weight in source.model.weights(index)
        if weight.prunable and weight.shape[0] == hidden
    }
    fields = source.model.config.to_dict()
    return {name: value for name, value in fields.items() if type(value) is int and value in inputs}


def find_units(source: Source, blocks: list[list[Axis]]) -> list[list[Unit]]:
    """The FFNs of every block, of the axes that get shorter in it. UnfitError where these are no FFNs."""
    found: list[list[Unit]] = []
    matrices = laid_out(source)
    for index, axes in enumerate(blocks):
        prefix, shapes = source.model.block_names[index] + ".", block_shapes(source, index)
        inside = {name.removeprefix(prefix): flag for name, flag in matrices.items() if name.startswith(prefix)}
        owners = dict.fromkeys(owner(axis.name) for axis in axes)
        groups = [[axis for axis in axes if owner(axis.name) == one] for one in owners]
        found.append([_unit(group, shapes, inside, source.model.hidden_size) for group in groups])
    return found


def _unit(axes: list[Axis], shapes: dict[str, tuple[int, ...]], matrices: dict[str, bool], hidden: int) -> Unit:
    into = reader(axes, shapes, matrices, hidden)
    out: list[Axis] = []
    for axis in axes:
        if axis is into:
            continue
        if len(shapes[axis.name]) == 1 and not axis.name.endswith("bias"):
            raise UnfitError(f"{axis.name} goes over all channels together")
        if axis.before == into.before:
            layouts = ((axis.before,),)
        elif axis.before == 2 * into.before:  # gate and up in one: one behind the other, or by turns
            layouts = ((into.before, into.before), (axis.before,))
        else:
            raise UnfitError(f"{axis.name} has {axis.before} outputs for {into.before} channels")
        out.append(Axis(axis.name, axis.dim, axis.before, axis.after, layouts))
    if not any(axis.name in matrices for axis in out):
        raise UnfitError(f"nothing computes what enters {into.name}")
    whole = Axis(into.name, into.dim, into.before, into.after, ((into.before,),))
    experts = shapes[into.name][0] if len(shapes[into.name]) == 3 else None
    return Unit(whole, tuple(out), into.before, into.after, experts)
