"""The matrices of a block: which of its on-disk tensors activations are multiplied with, and what each is for.

From headers, names and the outline of the model alone. What is left out by default is decided by what a matrix is in
the model: a router only chooses (`choices.py`); `x_proj` and `dt_proj` compute the coefficients of a state space; a flat
tensor that is used part by part holds several matrices, which have no names of their own. Norms, convolutions, biases
and state matrices are no matrices that activations are multiplied with, so they are not even listed.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from llmsparse.errors import CheckpointError
from llmsparse.models.naming import Group
from llmsparse.storage.checkpoint import CheckpointReader

Slot = tuple[str, int | None]  # (parameter name inside the block, expert): where an input enters

COEFFICIENTS = {"x_proj", "dt_proj"}  # of Mamba's state space (arXiv 2312.00752, algorithm 2)


@dataclass(frozen=True)
class Weight:
    """One matrix that activations are multiplied with."""

    name: str  # as on disk, without `.weight`; one expert of a three-dimensional tensor: `<name>.<expert>`
    key: str  # the on-disk tensor that holds it
    expert: int | None  # which matrix of a three-dimensional on-disk tensor
    shape: tuple[int, int]  # (out, in)
    transposed: bool  # the disk holds (in, out)
    slot: Slot  # where its input shows up in a Tap; weights that are one parameter in the module share it
    kind: str  # linear, expert, router, coefficients, parts or head
    prunable: bool  # chosen by default

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The (out, in) view of it in a dict of on-disk tensors."""
        tensor = tensors[self.key]
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix.T if self.transposed else matrix


def list_weights(
    reader: CheckpointReader,
    groups: Iterable[Group],
    module: nn.Module,
    prefix: str,
    transposed: Mapping[str, bool],
    kinds: Mapping[str, str],
) -> list[Weight]:
    """The weights in `groups`, which fill the parameters of `module`; their module names begin with `prefix`.

    `transposed`: parameter → laid out (in, out), for every parameter that activations are multiplied with, in the
    order in which they are, which is the order of the result too. `kinds`: parameter → kind, where that is known.
    """
    weights: list[Weight] = []
    order = {name: place for place, name in enumerate(transposed)}
    used = [(group, [name for name in group.targets if name in order]) for group in groups]
    used = sorted((pair for pair in used if pair[1]), key=lambda pair: order[pair[1][0]])
    for group, names in used:
        name = names[0].removeprefix(prefix)
        parameter = module.get_parameter(name)
        kind = kinds.get(prefix + name) or _kind(name, parameter)
        for key in group.keys:
            weights += _of_key(reader, group, key, name, tuple(parameter.shape), transposed[names[0]], kind)
    return weights


def _of_key(
    reader: CheckpointReader,
    group: Group,
    key: str,
    name: str,
    parameter: tuple[int, ...],  # its shape
    transposed: bool,
    kind: str,
) -> Iterator[Weight]:
    shape = reader.spec(key).shape
    if len(shape) not in (2, 3):
        raise CheckpointError(
            f"{reader.folder}: tensor {key!r} has shape {list(shape)}, and what activations are multiplied with has two "
            "dimensions, or three with experts; config.json and the weights do not belong together"
        )
    flipped = transposed != group.transposes(shape, parameter)
    out, width = (shape[-1], shape[-2]) if flipped else (shape[-2], shape[-1])
    wanted = parameter[-2] if transposed else parameter[-1]
    if width != wanted:
        raise CheckpointError(
            f"{reader.folder}: tensor {key!r} has shape {list(shape)}, but the config asks for {wanted} inputs; "
            "config.json and the weights do not belong together"
        )
    plain, chosen = key.removesuffix(".weight"), kind in ("linear", "expert")
    if len(shape) == 3:
        for expert in range(shape[0]):
            yield Weight(f"{plain}.{expert}", key, expert, (out, width), flipped, (name, expert), kind, chosen)
    else:
        expert = group.position(key) if len(parameter) == 3 else None
        yield Weight(plain, key, None, (out, width), flipped, (name, expert), kind, chosen)


def _kind(name: str, parameter: nn.Parameter) -> str:
    if parameter.dim() == 3:
        return "expert"
    return "coefficients" if name.split(".")[-2:-1] and name.split(".")[-2] in COEFFICIENTS else "linear"
