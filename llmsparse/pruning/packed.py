"""The packed form of a checkpoint that has just been pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmsparse.packing.pack import select_packable
from llmsparse.pruning.plan import PrunePlan
from llmsparse.pruning.report import PruneReport
from llmsparse.runs.progress import Progress
from llmsparse.storage.disk import parse_size


def packing(plan: PrunePlan, report: PruneReport, progress: Progress) -> Callable[[Path, Path], None] | None:
    """What makes the packed folder out of the dense one and notes in the report what that saved; None if not asked for."""

    def pack(dense: Path, packed: Path) -> None:
        packable = select_packable(dense, plan.recipe.trust_remote_code, progress)
        names = {"model": plan.output.name, "output": str(plan.output)}
        report.packing = packable.write(packed, parse_size(plan.recipe.max_shard_size), progress, **names)

    return pack if plan.staging else None
