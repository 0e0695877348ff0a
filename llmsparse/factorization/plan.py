"""What a factorization will do, decided and checked before a weight is read."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from llmsparse.calibration.least_squares import HELD_BACK, JUDGES
from llmsparse.errors import CalibrationError, CheckpointError
from llmsparse.factorization import containers, export
from llmsparse.factorization.block import ROUTER_TOKENS, FactorizeOptions, Target
from llmsparse.factorization.containers import Container, Shape
from llmsparse.factorization.export import Spec
from llmsparse.factorization.recipe import FactorizeRecipe
from llmsparse.factorization.router import NUMBERS_AT_ONCE
from llmsparse.factorization.split import Layout
from llmsparse.models.prunable import refuse_stored
from llmsparse.models.streamed import StreamedModel
from llmsparse.runs.joint import joint
from llmsparse.runs.memory import freed_bytes
from llmsparse.runs.opening import fetched, open_model, read_windows
from llmsparse.runs.partial import held_bytes
from llmsparse.runs.plan import RunPlan
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.disk import check_room, parse_size
from llmsparse.text.shares import spell_sources

PARTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
TOKENS_PER_EXPERT = 32  # of calibration, the least that says anything about an expert


@dataclass(frozen=True, kw_only=True)
class FactorizePlan(RunPlan[FactorizeRecipe]):
    """A factorization that has passed every check that needs no weights; `model` is the dense one."""

    layout: Layout
    container: Container
    targets: dict[str, Target]  # block name → its FFN, for the blocks that are factorized

    @property
    def resolved(self) -> FactorizeRecipe:
        return super().resolved.replace(container=self.container.name)

    @cached_property
    def copied(self) -> list[str]:
        """Keys that are copied as they are: all but the FFNs that are factorized."""
        replaced = {key for target in self.targets.values() for key in target.keys}
        return [key for key in self.reader.keys() if key not in replaced]

    @property
    def renamed(self) -> dict[str, str]:
        """Of a tied source whose container is not tied: the embedding that is not on disk → the one that is."""
        groups = self.model.naming.groups
        return {} if self.container.ties_head else {new: groups[old].keys[0] for new, old in self.model.tied.items()}

    def added(self) -> dict[str, Tensor]:
        return {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in self.zeros.items()}

    @property
    def options(self) -> FactorizeOptions:
        """What the solver of a block is told."""
        return FactorizeOptions(self.recipe, self.layout, self.container, self.device)

    @cached_property
    def zeros(self) -> dict[str, Spec]:
        """Biases that the container's attention has and the source's has not."""
        found: dict[str, Spec] = {}
        for index in range(len(self.model.block_names)):
            prefix, dtype = self.ffn(index).prefix, self.ffn(index).dtype
            shapes = {weight.slot[0]: weight.shape for weight in self.model.weights(index)}
            for bias in self.container.attention_biases:
                if prefix + bias not in self.reader.keys():
                    found[prefix + bias] = ((shapes[bias.removesuffix("bias") + "weight"][0],), dtype)
        return found

    @cached_property
    def tensors(self) -> Mapping[str, Spec]:
        """Shape and dtype of everything that will be written, block after block as in the source."""
        found: dict[str, Spec] = {
            key: (self.reader.spec(key).shape, self.reader.spec(key).dtype) for key in self.copied
        }
        found |= {new: found[old] for new, old in self.renamed.items()}
        found |= self.zeros
        width = self.model.hidden_size
        for target in self.targets.values():
            found |= export.specs(self.container, self.layout, target.prefix, width, target.dtype)
        return found

    def ffn(self, index: int) -> Target:
        """The FFN of a block, factorized or not."""
        return find_ffn(self.model, self.reader, index)

    def memory_bytes(self) -> int:
        """An estimate of the peak: what is there throughout, a block and what is read and written meanwhile, its FFN in
        fp32, the equations of the refit, and what a few tokens are made into."""
        neurons, width, itemsize = self.layout.neurons, self.model.hidden_size, self.dtype.itemsize
        tokens, on_cpu = self.windows.ids.numel(), self.device.type == "cpu"
        specs = [self.reader.spec(key) for key in self.model.block_keys(0)]
        stored = sum(spec.end - spec.begin for spec in specs) if on_cpu else 0
        block = sum(torch.Size(spec.shape).numel() for spec in specs) * itemsize
        made = 3 * neurons * width * (specs[0].dtype.itemsize if on_cpu else 0)  # experts, as they will be stored
        here, sums = self.share.most_tokens, self.share.sums_at_once
        held_out = self.share_of(self.held_out).most_tokens if self.held_out else 0
        streams = (here + 2 * held_out) * width * itemsize
        inputs = here * width * itemsize  # what enters the FFN
        drawn = 4 * min(tokens, ROUTER_TOKENS) * width * 3  # that the router is trained on; standardised; profiled
        ffn = 9 * 4 * neurons * width  # three matrices, the same by expert, and three of down projections
        outputs = 4 * min(tokens * (neurons + self.layout.routed * width), NUMBERS_AT_ONCE)
        slots, shared = self.layout.experts, self.layout.shared
        filled = (shared**2 + sum(range(shared + 1, slots + 1))) / slots**2  # of a matrix that is summed up
        matrices = max(3, math.ceil(sums * filled))
        equations = 4 * neurons * (matrices * neurons + (1 + sums) * width) if self.recipe.refit else 0
        judges = 4 * min(tokens // HELD_BACK, JUDGES) * (neurons + width) if self.recipe.refit else 0
        neighbours = stored + made  # the next block is read, and the last one written, meanwhile
        fitting = ffn + outputs + equations + judges + drawn + made
        heap = freed_bytes(self.device, stored)
        return self.footprint + heap + streams + inputs + block + stored + neighbours + fitting

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {
            "factorized": list(self.targets),
            "container": self.container.name,
            "layout": describe(self.layout),
        }

    def rows(self, plan: dict[str, Any]) -> dict[str, str]:
        return {
            "model": f"{plan['model']}, {plan['blocks']} blocks, {len(self.targets)} of them factorized",
            "output": plan["output"],
            "experts": spell(self.layout),
            "container": self.container.name,
            "how": f"{self.recipe.split} split, {self.recipe.router} router, "
            f"{'refit' if self.recipe.refit else 'no refit'}",
        }


@joint
def make_plan(
    recipe: FactorizeRecipe, *, resume: bool = False, overwrite: bool = False, download: bool = True
) -> FactorizePlan:
    """Resolve and check everything a run needs, from headers and shapes alone, then read the calibration text.

    Last of all weights are downloaded that are not here yet, unless `download` is off: a plan needs none.
    """
    check = partial(containers.check_source, where=recipe.model)
    opened = open_model(recipe, resume=resume, overwrite=overwrite, check=check)
    config, model, reader = opened.config, opened.model, opened.reader
    kept = recipe.kept(len(model.block_names))
    names = [name for index, name in enumerate(model.block_names) if index not in kept]
    targets = {name: find_ffn(model, reader, model.block_names.index(name)) for name in names}
    layout = Layout(config.intermediate_size, recipe.experts, recipe.shared, recipe.active)
    layout.check(f"each FFN of {recipe.model}")
    shape = Shape(config, layout, kept)
    container = containers.choose_container(recipe.container, shape)
    windows = read_windows(opened, recipe.calibration_samples)
    needed = TOKENS_PER_EXPERT * recipe.experts
    if windows.ids.numel() < needed:
        raise CalibrationError(
            f"{spell_sources(opened.recipe.calibration)}: {windows.ids.numel()} tokens of calibration are too few for "
            f"{recipe.experts} experts, wanted {needed} or more; give more text or --calibration-samples, or fewer --experts"
        )
    plan = FactorizePlan(
        **opened.fields, windows=windows, layout=layout, container=container, config=container.config(shape),
        targets=targets,
    )  # fmt: skip
    check_room(opened.output, plan.bytes_to_write + parse_size("1MB"), held_bytes(opened.output))
    return fetched(plan, download)


def find_ffn(model: StreamedModel, reader: CheckpointReader, index: int) -> Target:
    """Where block `index` has its gate, up and down projection."""
    weights = {weight.slot[0]: weight for weight in model.weights(index)}
    missing = [part for part in PARTS if part not in weights]
    if missing:
        raise CheckpointError(
            f"{reader.folder}: {model.block_names[index]} has no {missing[0]}; only a gated FFN will do"
        )
    gate, up, down = (weights[part] for part in PARTS)
    refuse_stored(reader.folder, ((one.key, reader.spec(one.key).dtype) for one in (gate, up, down)))
    dtype = torch.promote_types(reader.spec(gate.key).dtype, reader.spec(down.key).dtype)
    return Target(gate, up, down, gate.key.removesuffix(PARTS[0]), dtype)


def describe(layout: Layout) -> dict[str, Any]:
    return {
        "experts": layout.experts,
        "shared": layout.shared,
        "routed": layout.routed,
        "active": layout.active,
        "width": layout.width,
        "neurons": layout.neurons,
        "active_share": layout.active_share,
    }


def spell(layout: Layout) -> str:
    """One line: how many experts of which width, and what share of the neurons runs."""
    return (
        f"{layout.shared} shared and {layout.active} of {layout.routed} routed experts, {layout.width} neurons wide: "
        f"{layout.active_share:.0%} of {layout.neurons} neurons run for a token"
    )
