"""What a run will do, decided and checked before a weight is read.

Everything that can be refused is refused here: a pattern against a shape, a rule or a glob that matches nothing, a
window too long, a full disk. `llmsparse plan` prints the result; `prune` carries it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from llmsparse import __version__, calibration, source
from llmsparse.checkpoint import CheckpointReader
from llmsparse.device import choose_device, choose_dtype, split_batches, window_length
from llmsparse.disk import check_room, spell_size
from llmsparse.errors import RecipeError
from llmsparse.formats.bitmask import stored_bytes
from llmsparse.matching import HELD_OUT_SHARE, LEARNING_RATES, batches_per_step, probe_steps
from llmsparse.memory import available_bytes
from llmsparse.model import StreamedModel
from llmsparse.output import check_output, held_bytes
from llmsparse.recipe import Recipe
from llmsparse.run_recipe import from_arguments
from llmsparse.selection import Choice, choose
from llmsparse.source import Origin

if TYPE_CHECKING:
    from rich.console import RenderableType

PACKED_LAST = "; the dense checkpoint stands beside it until the run is done"
MATCH_STEPS = (300, 150, 75)  # of block matching by default: the most that is affordable, or none
MATCH_SECONDS_ON_CPU = 600
FLOPS_PER_THREAD = 30e9  # fp32 with gradients on one core; AVX2 measured at 34e9
HELD_OUT_TOKENS = 16384  # for the perplexity in the summary
STATISTICS_SHARE = 0.4  # of the memory that is free, for statistics held together


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no weights."""

    recipe: Recipe
    origin: Origin
    output: Path
    reader: CheckpointReader
    model: StreamedModel
    choices: dict[str, list[Choice]]  # block name → what is pruned in it
    windows: calibration.Windows
    device: torch.device
    dtype: torch.dtype
    match_steps: int
    packed_bytes: int  # what will be written in that format, as far as patterns alone can tell

    @property
    def folder(self) -> Path:
        """The source checkpoint."""
        return self.origin.folder

    @property
    def resolved(self) -> Recipe:
        """The recipe with all that `auto`, the model and the hub decided in it: another run of it does the same."""
        return self.recipe.replace(
            match_steps=self.match_steps,
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
        """As many at least as matching needs to hold some out."""
        size, width = self.recipe.batch_size, self.model.hidden_size
        return split_batches(self.windows.ids, size, self.device, width, least=HELD_OUT_SHARE)

    @cached_property
    def held_out(self) -> list[Tensor]:
        """In batches of the same size, so that this one number repeats the run."""
        return split_batches(self.windows.held_out, self.batches[0].shape[0], self.device, self.model.hidden_size)

    @cached_property
    def selected_keys(self) -> set[str]:
        return {choice.weight.key for choices in self.choices.values() for choice in choices}

    @cached_property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of everything that will be written: what the source holds."""
        return {key: (spec.shape, spec.dtype) for key in self.reader.keys() for spec in [self.reader.spec(key)]}

    @property
    def total_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape, _ in self.tensors.values())

    @property
    def bytes_to_write(self) -> int:
        return sum(spec.end - spec.begin for spec in map(self.reader.spec, self.reader.keys()))

    @property
    def statistics_budget(self) -> int:
        """Bytes of statistics that may be held at once."""
        return int(STATISTICS_SHARE * available_bytes(self.device))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one it resumes."""
        return {
            "recipe": {key: value for key, value in self.recipe.resolved().items() if key != "output"},
            "model": self.reader.fingerprint() | source.fingerprint(self.folder, self.recipe.trust_remote_code),
            "calibration": self.windows.fingerprint,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "batch size": self.batches[0].shape[0],
            "match steps": self.match_steps,
        }

    def memory_bytes(self) -> int:
        """An estimate of the peak: the largest block, the calibration activations, the statistics of its inputs."""
        itemsize = torch.empty((), dtype=self.dtype).element_size()
        block = outside = statistics = 0
        for index in range(len(self.model.block_names)):
            numel = sum(torch.Size(self.tensors[key][0]).numel() for key in self.model.block_keys(index))
            stored = sum(
                self.reader.spec(key).end - self.reader.spec(key).begin for key in self.model.block_keys(index)
            )
            block = max(block, numel * itemsize + (stored if self.device.type == "cpu" else 0))
        for key in self.model.outside_keys:
            outside += torch.Size(self.tensors[key][0]).numel() * itemsize
        for choices in self.choices.values():
            widths = {(c.weight.slot, c.weight.shape[1]): c.pruner.needs for c in choices}
            total = sum(needs.nbytes(width) for (_, width), needs in widths.items() if needs)
            statistics = max(statistics, min(total, self.statistics_budget))
        width = self.model.hidden_size
        copies = 3 if self.match_steps else 2
        activations = copies * (self.windows.ids.numel() + 2 * self.windows.held_out.numel()) * width * itemsize
        return block * (4 if self.match_steps else 1) + outside + statistics + activations

    def to_json(self) -> dict[str, Any]:
        methods = sorted({choice.method for choices in self.choices.values() for choice in choices})
        weights = [
            {"name": c.weight.name, "shape": c.weight.shape, "method": c.method, "pattern": str(c.pattern)}
            for choices in self.choices.values()
            for c in choices
        ]
        return {
            "model": self.recipe.model,
            "output": str(self.output),
            "blocks": len(self.model.block_names),
            "methods": methods,
            "weights": weights,
            "parameters_to_prune": sum(
                c.weight.shape[0] * c.weight.shape[1] for cs in self.choices.values() for c in cs
            ),
            "bytes_to_download": self.origin.bytes_to_download,
            "bytes_to_read": self.bytes_to_write,
            "bytes_to_write": self.bytes_to_write if self.recipe.format == "dense" else self.packed_bytes,
            "format": self.recipe.format,
            "memory_bytes": self.memory_bytes(),
            "match_steps": self.match_steps,
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
        patterns = sorted({weight["pattern"] for weight in plan["weights"]})
        rows = {
            "model": f"{plan['model']}, {plan['blocks']} blocks",
            "output": plan["output"],
            "prune": f"{len(plan['weights'])} weights, {plan['parameters_to_prune']:,} parameters, "
            f"by {', '.join(plan['methods'])} to {', '.join(patterns)}",
            "matching": f"{self.match_steps} steps a block" if self.match_steps else "off",
            "calibration": ", ".join(f"{key} {value}" for key, value in self.windows.protocol.items()),
            "compute": f"{plan['device']}, {plan['dtype']}, {plan['batch_size']} windows a batch",
            "read, write": f"{spell_size(plan['bytes_to_read'])}, {spell_size(plan['bytes_to_write'])}",
            "format": f"{plan['format']}{PACKED_LAST if plan['format'] == 'packed' else ''}",
            "memory": f"about {spell_size(plan['memory_bytes'])}",
        }
        if self.origin.absent:
            rows["download"] = f"{spell_size(self.origin.bytes_to_download)} of weights, not in the cache yet"
        for label, text in rows.items():
            table.add_row(Text(label, style="bold"), Text(text))
        return table


def plan(
    recipe: Recipe | str | Path | None = None, *, resume: bool = False, overwrite: bool = False, **keys: Any
) -> Plan:
    """What `prune` with the same recipe or keys would do; nothing is written, and no weights are downloaded."""
    return make_plan(from_arguments(Recipe, recipe, keys), resume=resume, overwrite=overwrite, download=False)


def make_plan(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, download: bool = True) -> Plan:
    """Resolve and check everything a run needs, from headers and shapes alone, then read the calibration text.

    Last of all weights are downloaded that are not here yet, unless `download` is off: a plan needs none.
    """
    device = choose_device(recipe.device)
    output = recipe.output_folder
    check_output(output, resume=resume, overwrite=overwrite)
    origin = source.look(recipe.model, recipe.revision)
    check_output(output, resume=resume, overwrite=overwrite, source=origin.folder)
    config = source.load_config(origin.folder, recipe.trust_remote_code)
    length = window_length(config, recipe.seq_len, recipe.calibration)
    reader = CheckpointReader(origin.folder, origin.absent)
    dtype = choose_dtype(recipe.dtype, device, reader)
    model = StreamedModel(reader, device=device, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    choices = choose(recipe, model)
    needed = sum(spec.end - spec.begin for spec in map(reader.spec, reader.keys()))
    packed = packed_bytes(reader, choices)
    if recipe.format == "packed" and packed == needed:
        raise RecipeError(
            "--format packed: at this sparsity no weight would become smaller; prune more, or write dense"
        )
    check_room(output, needed + (packed if recipe.format == "packed" else 0), held_bytes(output))
    stored_tokens = recipe.calibration.endswith(calibration.TOKEN_FILE_SUFFIX)
    tokenizer = None if stored_tokens else source.load_tokenizer(origin.folder, recipe.trust_remote_code)
    windows = calibration.load_windows(
        recipe.calibration,
        tokenizer,
        seq_len=length,
        samples=recipe.calibration_samples,
        seed=recipe.seed,
        held_out=max(8, min(32, HELD_OUT_TOKENS // (length or 512))),
        text_field=recipe.text_field,
        vocabulary=model.vocabulary,
    )
    window_length(config, windows.ids.shape[1], recipe.calibration)
    if origin.absent and download:
        origin = Origin(source.resolve(recipe.model, recipe.revision), commit=origin.commit)
        reader = CheckpointReader(origin.folder)
        model = StreamedModel(reader, device=device, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    draft = Plan(recipe, origin, output, reader, model, choices, windows, device, dtype, 0, packed)
    return replace(
        draft, match_steps=default_match_steps(draft) if recipe.match_steps == "auto" else recipe.match_steps
    )


def default_match_steps(plan: Plan) -> int:
    """Matching is on wherever it stays affordable: fully on any GPU, and on a CPU as far as minutes allow.

    The estimate counts, for each token and step, 2 operations forward and 4 backward for each parameter and for each
    product of attention.
    """
    if plan.device.type == "cuda":
        return MATCH_STEPS[0]
    width, (windows, tokens), most = plan.model.hidden_size, plan.batches[0].shape, len(plan.batches)
    parameters = sum(torch.Size(plan.tensors[key][0]).numel() for key in plan.selected_keys)
    products = parameters + 2 * len(plan.model.block_names) * tokens * width
    per_step = 6 * products * batches_per_step(windows, tokens, width, most=most) * windows * tokens
    for steps in MATCH_STEPS:
        total = steps + probe_steps(steps) * len(LEARNING_RATES)
        if total * per_step <= MATCH_SECONDS_ON_CPU * FLOPS_PER_THREAD * torch.get_num_threads():
            return steps
    return 0


def versions() -> dict[str, str]:
    return {"llmsparse": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def packed_bytes(reader: CheckpointReader, choices: Mapping[str, list[Choice]]) -> int:
    """Bytes of the whole checkpoint with every chosen weight packed that gains by it."""
    total = sum(spec.end - spec.begin for spec in map(reader.spec, reader.keys()))
    for choice in (choice for members in choices.values() for choice in members):
        numel, dtype = math.prod(choice.weight.shape), reader.spec(choice.weight.key).dtype
        nnz = numel - round(choice.pattern.sparsity * numel)
        described = {"shape": choice.weight.shape, "nnz": nnz, "pattern": str(choice.pattern)}
        packed = stored_bytes(described | {"dtype": str(dtype).removeprefix("torch.")})
        total -= max(0, numel * dtype.itemsize - packed)
    return total
