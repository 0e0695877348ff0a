"""What cutting a model's activations will do, decided and checked before a weight is read."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from llmsparse.calibration.inputs import EXPERT_ROWS
from llmsparse.calibration.selection import matching_weights
from llmsparse.cutting.block import ROWS
from llmsparse.cutting.layers import POOLED, QUICK
from llmsparse.cutting.recipe import ActivationsRecipe
from llmsparse.encodings.reader import encoding_of, open_checkpoint
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.models.cut_block import can_be_cut
from llmsparse.models.experts import runs_by_expert
from llmsparse.models.origin import Origin, is_packed, read_config
from llmsparse.models.prunable import refuse_shared_blocks
from llmsparse.models.streamed import Slot, StreamedModel, Weight
from llmsparse.packing.packed_reader import PackedReader
from llmsparse.runs.joint import joint
from llmsparse.runs.memory import freed_bytes
from llmsparse.runs.opening import fetched, open_model, read_windows
from llmsparse.runs.partial import held_bytes
from llmsparse.runs.plan import RunPlan
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.disk import check_room


@dataclass(frozen=True, kw_only=True)
class ActivationsPlan(RunPlan[ActivationsRecipe]):
    """A run that has passed every check that needs no calibration. `reader` is of what is on disk, packed or not."""

    weights: dict[str, list[Weight]]  # block name → those of the layers that leave inputs out
    left_whole: int  # weights that multiply in a way of their own

    @cached_property
    def copied(self) -> list[str]:
        return self.reader.keys()

    @cached_property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {key: (spec.shape, spec.dtype) for key in self.reader.keys() for spec in [self.reader.spec(key)]}

    def memory_bytes(self) -> int:
        """The process, activations, three blocks, and samples of one with their scores."""
        stored = max(
            sum(self.model.bytes_of(key) for key in self.model.block_keys(index))
            for index in range(len(self.model.block_names))
        )
        tokens = self.share.most_tokens + 2 * self.share_of(self.held_out).most_tokens
        acts = tokens * self.model.hidden_size * self.dtype.itemsize
        shapes = [{weight.slot: weight.shape for weight in some} for some in self.weights.values()]
        samples = max(map(self._samples, shapes), default=0)
        scores = 3 * 4 * ROWS * max((width for some in shapes for _, width in some.values()), default=0)
        running = 4 * self.batches[0].numel() * 4 * max(max(w.shape) for some in self.weights.values() for w in some)
        return self.footprint + acts + 4 * stored + freed_bytes(self.device, stored) + samples + max(scores, running)

    def _samples(self, shapes: Mapping[Slot, tuple[int, ...]]) -> int:
        """Bytes of what a block's inputs are sampled to, with the rules made of it; `shapes`: (out, in) by where it enters."""
        total, largest = 0, 0
        for (_, expert), (out, width) in shapes.items():
            sample = (ROWS if expert is None else EXPERT_ROWS) * width * self.dtype.itemsize
            looked_up = (QUICK if expert is None else 1) * width * 4
            total += sample + looked_up + 2 * 4 * width + out * self.dtype.itemsize  # norms, centre, what it adds
            largest = max(largest, sample if expert is None else POOLED * width * self.dtype.itemsize)
        experts = sum(expert is not None for _, expert in shapes)
        pooled = EXPERT_ROWS * max((width for _, width in shapes.values()), default=0) * experts * self.dtype.itemsize
        return total + largest + pooled

    def to_json(self) -> dict[str, Any]:
        chosen = [weight.name for some in self.weights.values() for weight in some]
        return super().to_json() | {"sparsity": self.recipe.share, "weights": chosen, "left_whole": self.left_whole}

    def rows(self, plan: dict[str, Any]) -> dict[str, str]:
        recipe = self.recipe
        whole = f"; {self.left_whole} others stay whole" if self.left_whole else ""
        return {
            "model": f"{plan['model']}, {plan['blocks']} blocks",
            "output": plan["output"],
            "leave out": f"{recipe.share:.4g} of the inputs of {len(plan['weights'])} weights, by {recipe.score} "
            f"({recipe.rule}, {recipe.allocation}, bias {recipe.bias}){whole}",
        }


@joint
def make_plan(
    recipe: ActivationsRecipe, *, resume: bool = False, overwrite: bool = False, download: bool = True
) -> ActivationsPlan:
    """Resolve and check everything a run needs, from headers and shapes alone, then read the text.

    Last of all weights are downloaded that are not here yet, unless `download` is off: a plan needs none.
    """
    opened = open_model(
        recipe, resume=resume, overwrite=overwrite, check=partial(_refuse_encoded, recipe), reader_of=_open
    )
    weights, left_whole = choose_weights(recipe, opened.model)
    reader = CheckpointReader(opened.origin.folder) if isinstance(opened.reader, PackedReader) else opened.reader
    check_room(opened.output, reader.nbytes, held_bytes(opened.output))
    windows = read_windows(opened, recipe.calibration_samples)
    fields: dict[str, Any] = opened.fields | {"reader": reader}
    plan = ActivationsPlan(**fields, windows=windows, weights=weights, left_whole=left_whole)
    return fetched(plan, download)


def choose_weights(recipe: ActivationsRecipe, model: StreamedModel) -> tuple[dict[str, list[Weight]], int]:
    """Block → weights of layers that leave inputs out, and how many others activations are multiplied with.

    CheckpointError for a model whose blocks share their weights, RecipeError where nothing is left.
    """
    refuse_shared_blocks(model)
    blocks = {name: model.weights(index) for index, name in enumerate(model.block_names)}
    usual = {
        name: [weight for weight in some if weight.prunable and _is_usual(model, index, weight)]
        for index, (name, some) in enumerate(blocks.items())
    }
    if not any(usual.values()):
        raise CheckpointError(
            f"{model.folder}: no linear layer multiplies as linear layers do, so none can leave inputs out"
        )
    candidates = [weight for some in usual.values() for weight in some]
    globs = {"only": recipe.only, "exclude": recipe.exclude}
    named = {weight.name for weight in matching_weights(candidates, **globs, tied=model.tied_head, verb="cut")}
    chosen = {name: [weight for weight in some if weight.name in named] for name, some in usual.items()}
    for name, some in chosen.items():
        layers = {weight.slot[0] for weight in some}
        for weight in usual[name]:
            if weight.slot[0] in layers and weight not in some:
                raise RecipeError(
                    f"{weight.name} is one layer with others in the model, and these leave inputs out; choose all of them "
                    "with --only and --exclude, or none"
                )
    every = [weight for some in blocks.values() for weight in some if weight.prunable]
    return chosen, len(every) - len(candidates)


def _is_usual(model: StreamedModel, index: int, weight: Weight) -> bool:
    parameter, expert = weight.slot
    if expert is not None:
        return runs_by_expert(model.module(index, parameter.rpartition(".")[0]))
    if weight.kind != "linear" or not parameter.endswith(".weight"):
        return False
    return can_be_cut(model.module(index, parameter.removesuffix(".weight")))


def _open(origin: Origin) -> CheckpointReader:
    if is_packed(read_config(origin.folder)):
        if origin.absent:
            raise RecipeError(f"{origin.folder.name}: packed, and not here yet; download it first, and name its folder")
        return PackedReader(origin.folder)
    return open_checkpoint(origin.folder, origin.absent)


def _refuse_encoded(recipe: ActivationsRecipe, config: Any) -> None:
    named = getattr(config, "_name_or_path", recipe.model)
    encoding = encoding_of(read_config(Path(named)))
    if encoding is not None:
        raise CheckpointError(
            f"{recipe.model}: its weights are stored as {encoding}, and this leaves a model's weights as they are; give the model "
            "as it was before, or what `llmsparse prune` makes of it"
        )
