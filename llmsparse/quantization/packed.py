"""The packed folder, made of the numbers and steps that a run has written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from llmsparse.formats import PackedTensor
from llmsparse.models.naming import Group
from llmsparse.packing.coded import Encoded, encode_groups
from llmsparse.quantization.block import STEPS
from llmsparse.quantization.plan import QuantizePlan
from llmsparse.quantization.report import QuantizeReport
from llmsparse.quantization.weight import coded
from llmsparse.runs.progress import Progress
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.disk import parse_size


def packing(plan: QuantizePlan, report: QuantizeReport, progress: Progress) -> Callable[[Path, Path], None]:
    """What makes the packed folder out of the staging folder, and notes in the report what it takes."""

    def pack(staged: Path, packed: Path) -> None:
        selection = encode_groups(
            CheckpointReader(staged),
            plan.reader,
            plan.model.naming,
            _groups(plan),
            lambda group: _encoded(plan, CheckpointReader(staged), group),
            staged.parent / "streams",
            progress,
        )
        names = {"model": plan.name, "output": str(plan.output)}
        report.packing = selection.write(packed, parse_size(plan.recipe.max_shard_size), progress, **names)

    return pack


def _groups(plan: QuantizePlan) -> Iterator[tuple[Group, tuple[str, ...]]]:
    for group in plan.model.naming.groups.values():
        if group.keys[0] in plan.selected:
            yield group, tuple(key + STEPS for key in group.keys)


def _encoded(plan: QuantizePlan, reader: CheckpointReader, group: Group) -> Encoded:
    """The module tensors of a group: what converts weights converts their numbers, and steps as weights of few columns."""
    numbers = dict(plan.model.naming.to_module(reader.read(group.keys)))
    read = reader.read(key + STEPS for key in group.keys)
    steps = dict(plan.model.naming.to_module({key: read[key + STEPS] for key in group.keys}))
    transposed = dict(next(laid_out for one, laid_out in plan.model.matrices() if one is group))
    dtype = plan.reader.spec(group.keys[0]).dtype
    weights: dict[str, PackedTensor] = {}
    for name, q in numbers.items():
        flipped = transposed.get(name, False)
        weights[name] = coded(q.mT if flipped else q, steps[name].mT if flipped else steps[name], dtype)
    return Encoded(weights, {}, transposed)
