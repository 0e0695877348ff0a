"""What a factorization will do, decided and checked before a weight is read: the sibling of `llmsparse.planning`."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse import calibration, source
from llmsparse.checkpoint import CheckpointReader, parse_size
from llmsparse.device import choose_device, choose_dtype, split_batches, window_length
from llmsparse.disk import check_room, spell_size
from llmsparse.errors import CalibrationError, CheckpointError
from llmsparse.factorization import containers, export
from llmsparse.factorization.containers import Container, Shape
from llmsparse.factorization.export import Spec
from llmsparse.factorization.recipe import FactorRecipe
from llmsparse.factorization.split import Layout
from llmsparse.model import StreamedModel, Weight
from llmsparse.output import check_output, held_bytes
from llmsparse.planning import HELD_OUT_TOKENS, versions
from llmsparse.source import Origin

if TYPE_CHECKING:
    from rich.console import RenderableType

PARTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
TOKENS_PER_EXPERT = 32  # of calibration, the least that says anything about an expert


@dataclass(frozen=True)
class Target:
    """The FFN of one block, as the source stores it: its three weights, and the prefix of the block's keys."""

    gate: Weight
    up: Weight
    down: Weight
    prefix: str
    dtype: torch.dtype  # that the experts are written in

    @property
    def keys(self) -> set[str]:
        return {self.gate.key, self.up.key, self.down.key}


@dataclass(frozen=True)
class FactorPlan:
    """A run that has passed every check that needs no weights."""

    recipe: FactorRecipe
    origin: Origin
    output: Path
    reader: CheckpointReader
    model: StreamedModel  # the dense one
    layout: Layout
    container: Container
    config: Any  # of the factorized model
    targets: dict[str, Target]  # block name → its FFN, for the blocks that are factorized
    windows: calibration.Windows
    device: torch.device
    dtype: torch.dtype

    @property
    def folder(self) -> Path:
        """The source checkpoint."""
        return self.origin.folder

    @property
    def resolved(self) -> FactorRecipe:
        """The recipe with all that `auto`, the model and the hub decided in it: another run of it does the same."""
        return self.recipe.replace(
            container=self.container.name,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            seq_len=self.windows.ids.shape[1],
            batch_size=self.batches[0].shape[0],
            revision=self.origin.commit or self.recipe.revision,
        )

    @property
    def name(self) -> str:
        """The model as the user named it, without the path."""
        return Path(self.recipe.model).resolve().name if Path(self.recipe.model).exists() else self.recipe.model

    @cached_property
    def batches(self) -> list[Tensor]:
        return split_batches(self.windows.ids, self.recipe.batch_size, self.device, self.model.hidden_size)

    @cached_property
    def held_out(self) -> list[Tensor]:
        """In batches of the same size, so that this one number repeats the run."""
        return split_batches(self.windows.held_out, self.batches[0].shape[0], self.device, self.model.hidden_size)

    @cached_property
    def copied(self) -> list[str]:
        """Keys that are copied as they are: all but the FFNs that are factorized."""
        replaced = {key for target in self.targets.values() for key in target.keys}
        return [key for key in self.reader.keys() if key not in replaced]

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
        found |= self.zeros
        width = self.model.hidden_size
        for target in self.targets.values():
            found |= export.specs(self.container, self.layout, target.prefix, width, target.dtype)
        return found

    @property
    def bytes_to_write(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one it resumes."""
        return {
            "recipe": {key: value for key, value in self.recipe.resolved().items() if key != "output"},
            "model": self.reader.fingerprint() | source.fingerprint(self.folder),
            "calibration": self.windows.fingerprint,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "batch size": self.batches[0].shape[0],
        }

    def ffn(self, index: int) -> Target:
        """The FFN of a block, factorized or not."""
        return find_ffn(self.model, self.reader, index)

    def memory_bytes(self) -> int:
        """An estimate of the peak: a block, its FFN in fp32, the equations of the refit, and the activations."""
        itemsize = torch.empty((), dtype=self.dtype).element_size()
        neurons, width = self.layout.neurons, self.model.hidden_size
        block = sum(torch.Size(self.reader.spec(key).shape).numel() for key in self.model.block_keys(0))
        equations = 4 * neurons * (3 * neurons + 2 * width) if self.recipe.refit else 0
        activations = (3 * self.windows.ids.numel() + 4 * self.windows.held_out.numel()) * width * itemsize
        return 2 * block * itemsize + 9 * 4 * neurons * width + equations + activations + 2**29

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.recipe.model,
            "output": str(self.output),
            "blocks": len(self.model.block_names),
            "factorized": list(self.targets),
            "container": self.container.name,
            "layout": describe(self.layout),
            "bytes_to_download": self.origin.bytes_to_download,
            "bytes_to_read": sum(spec.end - spec.begin for spec in map(self.reader.spec, self.reader.keys())),
            "bytes_to_write": self.bytes_to_write,
            "memory_bytes": self.memory_bytes(),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "calibration": self.windows.protocol,
            "batch_size": self.batches[0].shape[0],
        }

    def table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        plan = self.to_json()
        table = Table(box=None, show_header=False, pad_edge=False)
        rows = {
            "model": f"{plan['model']}, {plan['blocks']} blocks, {len(self.targets)} of them factorized",
            "output": plan["output"],
            "experts": spell(self.layout),
            "container": self.container.name,
            "how": f"{self.recipe.split} split, {self.recipe.router} router, "
            f"{'refit' if self.recipe.refit else 'no refit'}",
            "calibration": ", ".join(f"{key} {value}" for key, value in self.windows.protocol.items()),
            "compute": f"{plan['device']}, {plan['dtype']}, {plan['batch_size']} windows a batch",
            "read, write": f"{spell_size(plan['bytes_to_read'])}, {spell_size(plan['bytes_to_write'])}",
            "memory": f"about {spell_size(plan['memory_bytes'])}",
        }
        if self.origin.absent:
            rows["download"] = f"{spell_size(self.origin.bytes_to_download)} of weights, not in the cache yet"
        for label, text in rows.items():
            table.add_row(Text(label, style="bold"), Text(text))
        return table


def make_plan(
    recipe: FactorRecipe, *, resume: bool = False, overwrite: bool = False, download: bool = True
) -> FactorPlan:
    """Resolve and check everything a run needs, from headers and shapes alone, then read the calibration text.

    Last of all weights are downloaded that are not here yet, unless `download` is off: a plan needs none.
    """
    device = choose_device(recipe.device)
    output = recipe.output_folder
    check_output(output, resume=resume, overwrite=overwrite)
    origin = source.look(recipe.model, recipe.revision)
    check_output(output, resume=resume, overwrite=overwrite, source=origin.folder)
    config = source.load_config(origin.folder)
    containers.check_source(config, recipe.model)
    length = window_length(config, recipe.seq_len, recipe.calibration)
    reader = CheckpointReader(origin.folder, origin.absent)
    dtype = choose_dtype(recipe.dtype, device, reader)
    model = StreamedModel(reader, device=device, dtype=dtype)
    kept = recipe.kept(len(model.block_names))
    names = [name for index, name in enumerate(model.block_names) if index not in kept]
    targets = {name: find_ffn(model, reader, model.block_names.index(name)) for name in names}
    layout = Layout(config.intermediate_size, recipe.experts, recipe.shared, recipe.active)
    layout.check(f"each FFN of {recipe.model}")
    shape = Shape(config, layout, kept)
    container = containers.choose(recipe.container, shape)
    stored_tokens = recipe.calibration.endswith(calibration.TOKEN_FILE_SUFFIX)
    windows = calibration.load_windows(
        recipe.calibration,
        None if stored_tokens else source.load_tokenizer(origin.folder),
        seq_len=length,
        samples=recipe.calibration_samples,
        seed=recipe.seed,
        held_out=max(8, min(32, HELD_OUT_TOKENS // (length or 512))),
        text_field=recipe.text_field,
        vocabulary=model.vocabulary,
    )
    window_length(config, windows.ids.shape[1], recipe.calibration)
    needed = TOKENS_PER_EXPERT * recipe.experts
    if windows.ids.numel() < needed:
        raise CalibrationError(
            f"{recipe.calibration}: {windows.ids.numel()} tokens of calibration are too few for {recipe.experts} experts, "
            f"wanted {needed} or more; give more text or --calibration-samples, or fewer --experts"
        )
    plan = FactorPlan(
        recipe, origin, output, reader, model, layout, container, container.config(shape), targets, windows, device, dtype
    )  # fmt: skip
    check_room(output, plan.bytes_to_write + parse_size("1MB"), held_bytes(output))
    if not origin.absent or not download:
        return plan
    origin = Origin(source.resolve(recipe.model, recipe.revision), commit=origin.commit)
    reader = CheckpointReader(origin.folder)
    return replace(plan, origin=origin, reader=reader, model=StreamedModel(reader, device=device, dtype=dtype))


def find_ffn(model: StreamedModel, reader: CheckpointReader, index: int) -> Target:
    """Where block `index` has its gate, up and down projection."""
    weights = {weight.slot[0]: weight for weight in model.weights(index)}
    missing = [part for part in PARTS if part not in weights]
    if missing:
        raise CheckpointError(
            f"{reader.folder}: {model.block_names[index]} has no {missing[0]}; only a gated FFN will do"
        )
    gate, up, down = (weights[part] for part in PARTS)
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
