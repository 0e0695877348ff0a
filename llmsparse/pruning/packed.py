"""The packed form of a checkpoint that has just been pruned: values as they are, or as small integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from llmsparse.formats import PackedTensor
from llmsparse.models.naming import Group
from llmsparse.packing.coded import Encoded, encode_groups
from llmsparse.packing.pack import Selection, outputs_first, select_packable
from llmsparse.packing.values import LARGEST, coded_values
from llmsparse.pruning.plan import PrunePlan
from llmsparse.pruning.report import PruneReport
from llmsparse.runs.progress import Progress
from llmsparse.storage.disk import parse_size


def packing(plan: PrunePlan, report: PruneReport, progress: Progress) -> Callable[[Path, Path], None] | None:
    """What makes the packed folder out of the dense one and notes in the report what that saved; None if not asked for."""

    def pack(dense: Path, packed: Path) -> None:
        packable = select_packable(dense, plan.recipe.trust_remote_code, progress)
        if plan.recipe.values in LARGEST:
            packable = _coded(packable, plan.recipe.values, dense.parent / "streams", progress)
        names = {"model": plan.output.name, "output": str(plan.output)}
        report.packing = packable.write(packed, parse_size(plan.recipe.max_shard_size), progress, **names)

    return pack if plan.staging else None


def _coded(packable: Selection, values: str, beside: Path, progress: Progress) -> Selection:
    """The same weights, with values of 8 or 4 bits."""
    parts = {part.group.target: part for part in packable.packables}

    def encode(group: Group) -> Encoded:
        layers = parts[group.target].layers
        weights: dict[str, PackedTensor] = {}
        dense: dict[str, Tensor] = {}
        for name, tensor in packable.naming.to_module(packable.reader.read(group.keys)):
            if name in layers:
                weights[name] = coded_values(outputs_first(tensor, layers[name]), values)
            else:
                dense[name] = tensor
        return Encoded(weights, dense, {name: bool(described.get("transposed")) for name, described in layers.items()})

    groups = [(part.group, ()) for part in packable.packables]
    return encode_groups(packable.reader, packable.reader, packable.naming, groups, encode, beside, progress)
