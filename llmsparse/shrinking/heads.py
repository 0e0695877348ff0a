"""Fewer attention heads in every layer, in whole key-value groups: those that add least to the output of attention go, the
output projection is fitted.

`head_dim` is written out where the config left it to be derived from the hidden size.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from fractions import Fraction

from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.shrinking.narrowing import Axis, UnfitError, Unit, reader
from llmsparse.shrinking.recipe import ShrinkRecipe, refuse_amount
from llmsparse.shrinking.reduction import Reduction, Source
from llmsparse.shrinking.shapes import block_shapes, check_runs, config_field, narrower_blocks
from llmsparse.shrinking.width import Narrower, laid_out

HEADS, GROUPS, HEAD_DIM = "num_attention_heads", "num_key_value_heads", "head_dim"


class Heads(Narrower):
    """Fewer key-value groups, and the query heads that belong to them."""

    name = "heads"
    pieces = "key-value groups"


def plan(recipe: ShrinkRecipe, source: Source) -> Reduction:
    """Attention with as many heads as the recipe says. RecipeError or CheckpointError where that cannot be."""
    assert recipe.heads is not None
    config, kind = source.model.config, source.model.config.model_type
    known = config.to_dict()
    heads = known.get(config_field(source, HEADS))
    if type(heads) is not int:
        raise CheckpointError(f"{source.where}: {kind} has no attention heads to take out")
    groups_field = config_field(source, GROUPS)
    groups = known.get(groups_field) or heads
    if heads % groups:
        raise CheckpointError(f"{source.where}: {heads} heads are no multiple of {groups} key-value groups")
    kept = groups_kept(recipe.heads, heads, groups)
    fields = {config_field(source, HEADS): kept * heads // groups}
    if groups_field in known:
        fields[groups_field] = kept
    try:
        try:
            units = _units(source, fields, heads, groups, kept)
        except UnfitError:
            if known.get(HEAD_DIM) or isinstance(getattr(type(config), HEAD_DIM, None), property):
                raise
            fields[HEAD_DIM] = source.model.hidden_size // heads
            units = _units(source, fields, heads, groups, kept)
        check_runs(source, fields)
    except UnfitError as error:
        raise CheckpointError(f"{source.where}: the attention of {kind} cannot be made narrower: {error}") from error
    if known.get(HEAD_DIM) and HEAD_DIM not in source.raw:
        fields[HEAD_DIM] = known[HEAD_DIM]
    return Heads(source.model, fields, units, recipe.refit)


def groups_kept(amount: str, heads: int, groups: int) -> int:
    """How many key-value groups "75%" or "24" heads are. RecipeError where they are not whole groups."""
    share = Fraction(amount.removesuffix("%")) / 100 if amount.endswith("%") else Fraction(int(amount), heads)
    kept = share * groups
    if kept <= groups and (kept.denominator != 1 or not kept):
        size = heads // groups
        nearest = min(range(1, groups), key=lambda number: abs(number - kept), default=None)
        hint = f"; use --heads {nearest * size}" if nearest else ""
        raise RecipeError(
            f"--heads {amount}: the {heads} heads go in {groups} key-value groups of {size}, and {amount} of them are no whole "
            f"groups{hint}"
        )
    refuse_amount("heads", amount, int(share * heads), heads)
    return int(kept)


def _units(source: Source, fields: dict[str, int], heads: int, groups: int, kept: int) -> list[list[Unit]]:
    """The attention of every block that gets narrower with these fields. UnfitError where one does not do so by groups."""
    matrices = laid_out(source)
    found: list[list[Unit]] = []
    for index, axes in enumerate(narrower_blocks(source, fields)):
        prefix, shapes = source.model.block_names[index] + ".", block_shapes(source, index)
        inside = {name.removeprefix(prefix): flag for name, flag in matrices.items() if name.startswith(prefix)}
        found.append([_unit(axes, shapes, inside, source.model.hidden_size, heads, groups, kept)] if axes else [])
    return found


def _unit(
    axes: list[Axis],
    shapes: dict[str, tuple[int, ...]],
    matrices: dict[str, bool],
    hidden: int,
    heads: int,
    groups: int,
    kept: int,
) -> Unit:
    into = reader(axes, shapes, matrices, hidden)
    fused = sum(axis.name in matrices for axis in axes) == 2  # the output projection, and one for query, key and value
    out: list[Axis] = []
    for axis in axes:
        if axis.before % groups or axis.after * groups != axis.before * kept:
            raise UnfitError(
                f"{axis.name} has {axis.before} entries for {groups} key-value groups, {axis.after} for {kept}"
            )
        if axis is into:
            continue
        if len(shapes[axis.name]) == 1 and not axis.name.endswith("bias") and axis.before != heads:
            raise UnfitError(f"{axis.name} goes over all heads together")
        layouts = ((axis.before,),)  # group behind group
        rest = axis.before - into.before
        if fused and rest > 0 and rest % (2 * groups) == 0:  # all queries, all keys, all values
            layouts = ((into.before, rest // 2, rest // 2), *layouts)
        out.append(Axis(axis.name, axis.dim, axis.before, axis.after, layouts))
    whole = Axis(into.name, into.dim, into.before, into.after, ((into.before,),))
    return Unit(whole, tuple(out), groups, kept, None)
