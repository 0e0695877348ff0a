"""The rules of one block: samples of what enters its layers, a share for each, and the thresholds that leave out as much.

Thresholds are set in the order in which the layers run, each on what enters it when those before it leave out their inputs
already: so the shares that were asked for are those that are met.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from llmsparse.calibration.inputs import Input, calibrate, learn_inputs
from llmsparse.cutting.allocation import Levels, greedy, uniform
from llmsparse.cutting.recipe import ActivationsRecipe
from llmsparse.errors import LlmsparseError
from llmsparse.models.block import unwrap
from llmsparse.models.streamed import Activations, Block, Weight
from llmsparse.models.thresholds import Applied, applied, cutting, matrix_of
from llmsparse.sparsity.activation import column_norms, scores, threshold_at

ROWS = 4096  # of an input, to choose its thresholds from
GREEDY_TOKENS = 1024  # that the error of a block is measured on, at least a window


@dataclass(frozen=True)
class CutLayer:
    """A layer that leaves inputs out."""

    name: str  # in the model
    shape: tuple[int, int]  # (out, in)
    share: float  # of its inputs left out
    rule: dict[str, Any]  # for config.json


@dataclass(frozen=True)
class CutBlock:
    """What the journal keeps of a block."""

    name: str
    layers: list[CutLayer]
    error: float | None  # ‖cut − whole‖² / ‖whole − entering‖² of the block's output, on a sample
    means: dict[str, Tensor] = field(
        default_factory=dict[str, Tensor]
    )  # layer → (in,) fp32, what stands for what is left out

    def to_json(self) -> dict[str, Any]:
        means: dict[str, list[float]] = {name: mean.tolist() for name, mean in self.means.items()}
        return {"name": self.name, "layers": list(map(asdict, self.layers)), "error": self.error, "means": means}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> CutBlock:
        layers = [CutLayer(**(layer | {"shape": tuple(layer["shape"])})) for layer in entry["layers"]]
        means = {name: torch.tensor(mean, dtype=torch.float32) for name, mean in entry["means"].items()}
        return cls(entry["name"], layers, entry["error"], means)

    def rules(self, block: Block, recipe: ActivationsRecipe) -> dict[str, Applied]:
        """By layer, named within the block; on its device."""
        found: dict[str, Applied] = {}
        for layer in self.layers:
            inside = layer.name.removeprefix(self.name + ".")
            weight, bias = _parts(block, inside)
            mean = self.means.get(layer.name)
            mean = None if mean is None else mean.to(weight.device)
            found[inside] = applied(layer.rule, recipe.score, recipe.bias, mean, weight, bias)
        return found


class _Layers:
    """The layers of a block that is being measured, with samples of what enters them."""

    def __init__(self, block: Block, recipe: ActivationsRecipe) -> None:
        self._block, self._recipe = block, recipe
        self.samples: dict[str, Tensor] = {}  # layer → (rows, in)
        self.means: dict[str, Tensor] = {}
        self._sorted: dict[str, Tensor] = {}

    def take(self, inputs: Sequence[Input]) -> None:
        """Keep the samples of these inputs."""
        for entry in inputs:
            for slot in entry.slots:
                name = slot[0].removesuffix(".weight")
                self.samples[name] = entry.sample
                self.means.pop(name, None)
                self._sorted.pop(name, None)
            entry.rows.clear()

    def rule(self, name: str, share: float, exact: bool) -> Applied:
        """The rule by which a layer leaves out a share of its sample; `exact`, or as a sorted part of it says."""
        recipe, sample = self._recipe, self.samples[name]
        weight, bias = _parts(self._block, name)
        centre = self._centre(name) if recipe.bias == "centre" else None
        norms = column_norms(weight) if recipe.score == "wina" else None
        if recipe.rule == "topk":
            rule: dict[str, Any] = {"keep": round((1 - share) * sample.shape[1])}
        else:
            rule = {"threshold": self._threshold(name, share, norms, centre, exact)}
        mean = centre
        if recipe.bias == "fold":
            cut = applied(rule, recipe.score, "none", None, weight, bias).cut
            mean = (sample.float() - cut(sample).float()).mean(0)
            self.means[name] = mean
        return applied(rule, recipe.score, recipe.bias, mean, weight, bias)

    def _centre(self, name: str) -> Tensor:
        if name not in self.means:
            self.means[name] = self.samples[name].float().median(dim=0).values
        return self.means[name]

    def _threshold(self, name: str, share: float, norms: Tensor | None, centre: Tensor | None, exact: bool) -> float:
        def found() -> Tensor:
            sample = self.samples[name]
            moved = sample if centre is None else (sample.float() - centre).to(sample.dtype)
            return scores(moved, norms)

        if exact:
            return threshold_at(found(), share)
        if name not in self._sorted:
            every = max(1, self.samples[name].shape[0] // 512)
            self._sorted[name] = found()[::every].flatten().sort().values
        known = self._sorted[name]
        count = round(share * known.numel())
        return known[count - 1].item() if count else -1.0


@torch.no_grad()
def choose(
    block: Block,
    acts: Activations,
    weights: Sequence[Weight],
    recipe: ActivationsRecipe,
    note: Callable[[str, int], Callable[[], None]],
) -> CutBlock:
    """The rules of a block for what enters it, `acts`; `weights`: those of the layers that leave inputs out."""
    if not weights:
        return CutBlock(block.name, [], None)
    inputs = learn_inputs(block, acts, weights)
    layers = _Layers(block, recipe)
    _measure(block, acts, inputs, recipe, note)
    for entry in inputs:
        if not entry.rows:
            name = entry.weights[0].name
            raise LlmsparseError(f"no calibration token reached {name}; leave it out with --exclude {name!r}")
    layers.take(inputs)
    sizes = {name: _parts(block, name)[0].numel() for name in layers.samples}
    error = _BlockError(block, acts)

    def error_at(levels: Levels) -> float:
        return error({name: layers.rule(name, share, exact=False) for name, share in levels.items() if share > 0})

    levels = uniform(sizes, recipe.share)
    if recipe.allocation == "greedy" and recipe.share > 0 and len(sizes) > 1:
        levels = greedy(sizes, recipe.share, error_at)
    rules: dict[str, Applied] = {}
    for number, entry in enumerate(inputs):
        if number:
            with cutting(block.module, rules):
                _measure(block, acts, [entry], recipe, note)
            layers.take([entry])
        for slot in entry.slots:
            name = slot[0].removesuffix(".weight")
            rules[name] = layers.rule(name, levels[name], exact=True)
    made = [
        CutLayer(
            f"{block.name}.{name}", cast(Any, tuple(_parts(block, name)[0].shape)), levels[name], rule.cut.described()
        )
        for name, rule in rules.items()
    ]
    means = {f"{block.name}.{name}": mean.cpu() for name, mean in layers.means.items()}
    return CutBlock(block.name, made, error.relative(error(rules)), means)


def _measure(
    block: Block,
    acts: Activations,
    inputs: Sequence[Input],
    recipe: ActivationsRecipe,
    note: Callable[[str, int], Callable[[], None]],
) -> None:
    """Sample what enters layers."""
    device = matrix_of(block.module.get_submodule(inputs[0].slots[0][0].removesuffix(".weight"))).device
    advance = note(f"measuring {block.name}", len(acts.hidden))
    for entry in inputs:
        entry.rows.clear()
        entry.calls = None
    calibrate(block, acts, inputs, lambda entry: None, device=device, seed=recipe.seed, advance=advance, sampled=ROWS)


class _BlockError:
    """How far a block's output is off when its layers leave inputs out, on the first windows."""

    def __init__(self, block: Block, acts: Activations) -> None:
        self._block = block
        tokens = 0
        self._inputs: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
        self._change = 0.0
        for batch, hidden in enumerate(acts.hidden):
            if tokens >= GREEDY_TOKENS:
                break
            tokens += hidden.shape[0] * hidden.shape[1]
            whole = block.call(acts, batch)
            entering = hidden.to(whole.device)
            self._change += (whole.float() - entering.float()).square().sum().item()
            self._inputs.append((*acts.calls[block.index][batch].bind(entering), whole))

    def __call__(self, rules: Mapping[str, Applied]) -> float:
        total = 0.0
        with cutting(self._block.module, rules):
            for args, kwargs, whole in self._inputs:
                total += (unwrap(self._block.module(*args, **kwargs)).float() - whole.float()).square().sum().item()
        return total

    def relative(self, error: float) -> float | None:
        return error / self._change if self._change > 0 else None


def _parts(block: Block, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of a layer of a block."""
    module = block.module.get_submodule(name)
    return matrix_of(module), cast("Tensor | None", module.bias)
