"""Which weights a verb takes: globs over on-disk names (without `.weight`).

The default is every matrix that a block multiplies activations with; the model says what that is (`Weight.prunable`).
`only` restricts, `include` adds, `exclude` removes, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from llmsparse.errors import RecipeError, did_you_mean
from llmsparse.models.streamed import Weight


def matching_weights(
    weights: Sequence[Weight],
    *,
    only: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tied: str | None = None,
    verb: str = "prune",
) -> list[Weight]:
    """The weights to `verb`, in their given order.

    `tied` names an output head that is the input embedding, which is why it is not among the weights.
    Raises RecipeError for a glob that matches nothing, for an `include` of what cannot be pruned, and when nothing
    is left.
    """
    names = [weight.name for weight in weights]
    for option, globs in (("only", only), ("include", include), ("exclude", exclude)):
        for glob in globs:
            if any(fnmatchcase(name, glob) for name in names):
                continue
            if tied is not None and fnmatchcase(tied, glob):
                raise RecipeError(
                    f"--{option} {glob!r}: {tied} is tied to the input embedding, which is left as it is; leave it out"
                )
            raise RecipeError(f"--{option} {glob!r} matches none of {len(names)} weights{_example(glob, names)}")

    def chosen(weight: Weight) -> bool:
        included = any(fnmatchcase(weight.name, glob) for glob in include)
        default = weight.prunable and (not only or any(fnmatchcase(weight.name, glob) for glob in only))
        return (default or included) and not any(fnmatchcase(weight.name, glob) for glob in exclude)

    selected = [weight for weight in weights if chosen(weight)]
    if not selected:
        raise RecipeError(
            f"nothing is left to {verb}: --only, --include and --exclude select none of {len(names)} weights; "
            "see their names with `llmsparse inspect MODEL`"
        )
    return selected


def _example(glob: str, names: Sequence[str]) -> str:
    hint = did_you_mean(glob, list(names)).split(" known:")[0].rstrip(";")
    return hint or f"; a name looks like {names[0]!r}"
