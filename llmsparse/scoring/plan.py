"""What measuring a model's experts will do, decided and checked before a weight is read."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.models.prunable import refuse_flat_experts
from llmsparse.models.streamed import StreamedModel
from llmsparse.runs.device import split_batches
from llmsparse.runs.joint import joint
from llmsparse.runs.memory import freed_bytes
from llmsparse.runs.opening import fetched, open_model, read_windows
from llmsparse.runs.partial import held_bytes
from llmsparse.runs.plan import RunPlan
from llmsparse.scoring.file import ScoresHeader, router_checksums, specs_of
from llmsparse.scoring.mixture import Mixture, find_mixture
from llmsparse.scoring.recipe import ScoresRecipe
from llmsparse.storage.disk import check_room, parse_size


def find_mixtures(model: StreamedModel, where: str, instead: str) -> dict[int, Mixture]:
    """Block number → its routed experts. CheckpointError, with what to do `instead`, for a model that has none."""
    blocks = range(len(model.block_names))
    found = {index: mixture for index in blocks if (mixture := find_mixture(model, index)) is not None}
    if not found:
        raise CheckpointError(f"{where}: {model.config.model_type} has no routed experts; {instead}")
    return found


@dataclass(frozen=True, kw_only=True)
class ScoresPlan(RunPlan[ScoresRecipe]):
    """A measurement that has passed every check that needs no weights."""

    mixtures: Mapping[int, Mixture]  # block number → its experts

    @property
    def metadata(self) -> dict[str, str]:
        names = self.model.block_names
        recipe = {key: value for key, value in self.resolved.resolved().items() if key != "output"}
        return ScoresHeader(
            model=self.name,
            experts={names[index]: mixture.experts for index, mixture in self.mixtures.items()},
            routers=router_checksums(self.model, self.reader, self.mixtures),
            texts=self.texts,
            described={"recipe": recipe, "calibration": self.protocol, "versions": self.versions},
        ).metadata()

    @cached_property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for index, mixture in self.mixtures.items():
            found |= specs_of(self.model.block_names[index], len(self.texts), mixture.experts)
        return found

    @cached_property
    def batches(self) -> list[Tensor]:
        return split_batches(self.windows.ids, self.recipe.batch_size, self.device, self.model.hidden_size, routed=True)

    @cached_property
    def copied(self) -> list[str]:
        return []

    def memory_bytes(self) -> int:
        """An estimate of the peak: what is there throughout, calibration, a block as it is stored and as it is computed
        with, the one that is read meanwhile, sums, and what a batch is made into."""
        specs = [
            [self.reader.spec(key) for key in self.model.block_keys(index)]
            for index in range(len(self.model.block_names))
        ]
        numbers = max(sum(torch.Size(spec.shape).numel() for spec in block) for block in specs)
        stored = (
            max(sum(spec.end - spec.begin for spec in block) for block in specs) if self.device.type == "cpu" else 0
        )
        width, itemsize = self.model.hidden_size, self.dtype.itemsize
        experts = max(mixture.experts for mixture in self.mixtures.values())
        sums = 8 * experts * (experts + 8) * len(self.texts) * 2
        working = 8 * self.batches[0].numel() * (width + experts) * 4
        head = 2 * self.model.vocabulary * width * itemsize
        streams = self.windows.ids.numel() * width * itemsize
        block = 2 * stored + numbers * itemsize + sums + working
        return self.footprint + freed_bytes(self.device, stored) + streams + max(head, block)

    def to_json(self) -> dict[str, Any]:
        counts = sorted({mixture.experts for mixture in self.mixtures.values()})
        return super().to_json() | {"layers": len(self.mixtures), "experts": counts}

    def rows(self, plan: dict[str, Any]) -> dict[str, str]:
        experts = " or ".join(map(str, plan["experts"]))
        return {
            "model": f"{plan['model']}, {plan['blocks']} blocks, {plan['layers']} of them with {experts} routed experts",
            "output": plan["output"],
        }


@joint
def make_plan(
    recipe: ScoresRecipe, *, resume: bool = False, overwrite: bool = False, download: bool = True
) -> ScoresPlan:
    """Resolve and check everything a measurement needs, from headers and shapes alone, then read the text.

    Last of all weights are downloaded that are not here yet, unless `download` is off: a plan needs none.
    """
    opened = open_model(recipe, resume=resume, overwrite=overwrite)
    refuse_flat_experts(opened.model)
    mixtures = find_mixtures(opened.model, recipe.model, "there is nothing to measure")
    windows = read_windows(opened, recipe.calibration_samples)
    plan = ScoresPlan(**opened.fields, windows=windows, mixtures=mixtures)
    check_room(opened.output, plan.bytes_to_write + parse_size("1MB"), held_bytes(opened.output))
    return fetched(plan, download)
