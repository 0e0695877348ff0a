"""The share of a packed weight that one process of several multiplies with: rows, and columns, as vLLM cuts them."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from llmsparse.errors import CheckpointError
from llmsparse.formats import PackedTensor
from llmsparse.formats.bitmask import Bitmask
from llmsparse.formats.mask import nofm
from llmsparse.formats.nested import Nested
from llmsparse.formats.shortest import shortest_code


def share_of(sizes: int, share: int, rank: int, processes: int) -> slice:
    """Which of `sizes` rows are those of a process that holds `share`. Where there are more processes than shares, as of
    the keys of grouped attention, neighbours hold the same."""
    copies = max(1, processes * share // max(1, sizes))
    start = rank // copies * share
    return slice(start, min(start + share, sizes))


def cut(name: str, packed: PackedTensor, rows: slice, columns: slice) -> PackedTensor:
    """The rows and columns of a matrix (out, in), packed. CheckpointError where the columns that share a step would be
    divided."""
    out, width = packed.shape
    if rows != slice(0, out):
        packed = packed.rows(rows.start, rows.stop)
    if columns == slice(0, width):
        return packed
    if isinstance(packed, Nested):
        return _cut_numbers(name, packed, columns)
    assert isinstance(packed, Bitmask)
    group = nofm(packed.pattern)
    whole = group is None or (columns.start % group.m == 0 and columns.stop % group.m == 0)
    weight, keep = packed.unpack()[:, columns], packed.keep()[:, columns]
    return Bitmask.pack(weight.cpu(), packed.pattern if whole else "unstructured", keep.cpu())


def _cut_numbers(name: str, packed: Nested, columns: slice) -> Nested:
    width, group = packed.shape[-1], packed.group
    if group < width and (columns.start % group or (columns.stop % group and columns.stop != width)):
        raise CheckpointError(
            f"{name}: {group} columns share a step, and a process would take columns {columns.start} to {columns.stop}; "
            "choose another --tensor-parallel-size"
        )
    steps = packed.steps
    if group < width:
        steps = steps[:, columns.start // group : -(-columns.stop // group)]
    q = packed.numbers()[:, columns].contiguous()
    code, _ = shortest_code(q.numpy())
    steps = steps.cpu().contiguous()
    part = Nested.written(q, steps, code, packed.tile_rows, min(group, q.shape[-1]), packed.stored)
    return part.moved(packed.device, packed.dtype)
