"""The tensors of a block with fewer pieces, as they are stored."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from llmsparse.errors import NumericalError
from llmsparse.models.streamed import StreamedModel
from llmsparse.shrinking.narrowing import Unit, cut_parameters


def narrow(
    model: StreamedModel,
    index: int,
    tensors: Mapping[str, Tensor],
    units: Iterable[Unit],
    layouts: Sequence[int],
    kept: Sequence[Sequence[Tensor]],
    fitted: Mapping[str, Sequence[Tensor | None]],
) -> dict[str, Tensor]:
    """On-disk tensors of block `index` with the units cut to the pieces that are kept. `fitted`: projection → its matrices
    (out, what stays), which take the place of what was cut. NumericalError for a value that the stored dtype does not reach.
    """
    found = dict(tensors)
    prefix = model.block_names[index] + "."
    for unit, layout, some in zip(units, layouts, kept, strict=True):
        names = {prefix + axis.name for axis in unit.axes}
        keys = [
            key for group in model.naming.groups.values() if names.intersection(group.targets) for key in group.keys
        ]
        inside = {
            name.removeprefix(prefix): tensor
            for name, tensor in model.naming.to_module({key: found[key] for key in keys})
        }
        cut = inside | cut_parameters(unit, layout, inside, some)
        if unit.into.name in fitted:
            cut[unit.into.name] = _with_fitted(unit, cut[unit.into.name], fitted[unit.into.name], prefix)
        found |= model.naming.to_disk({prefix + name: tensor for name, tensor in cut.items()})
    return found


def _with_fitted(unit: Unit, cut: Tensor, fitted: Sequence[Tensor | None], prefix: str) -> Tensor:
    """A projection as it is stored, with fitted matrices (out, in) in the place of its own."""
    weight = cut.clone()
    for matrix, own in zip(fitted, [weight] if unit.experts is None else weight, strict=True):
        if matrix is not None:
            own.copy_(matrix if unit.into.dim == -1 else matrix.T)
    if not bool(weight.isfinite().all()):
        dtype = str(cut.dtype).removeprefix("torch.")
        raise NumericalError(
            f"{prefix}{unit.into.name}: the refit made values that {dtype}, which it is stored in, does not reach; use --no-refit, "
            "or a checkpoint in bfloat16 or float32"
        )
    return weight
