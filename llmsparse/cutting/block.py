"""The rules of one block: samples of what enters its layers, a share for each, and the thresholds that leave out as much.

Thresholds are set in the order in which the layers run, each on what enters it when those before it leave out their inputs
already: so the shares that were asked for are those that are met.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmsparse.calibration.inputs import Input, calibrate, learn_inputs
from llmsparse.cutting.allocation import Levels, greedy, uniform
from llmsparse.cutting.layers import Layers, described
from llmsparse.cutting.recipe import ActivationsRecipe
from llmsparse.models.block import unwrap
from llmsparse.models.cut_block import cutting
from llmsparse.models.streamed import Activations, Block, Weight
from llmsparse.models.thresholds import Rule, Thresholds

ROWS = 4096  # of an input, to choose its thresholds from
GREEDY_TOKENS = 1024  # that the error of a block is measured on, at least a window


@dataclass(frozen=True)
class CutLayer:
    """A layer that leaves inputs out."""

    name: str  # in the model; of experts their parameter
    shape: tuple[int, int]  # (out, in), of each expert
    share: float  # of its inputs left out
    rule: dict[str, Any]  # for config.json
    met: float = 1.0  # how many of its matrices a token meets; of experts those that it is routed to


@dataclass(frozen=True)
class CutBlock:
    """What the journal keeps of a block."""

    name: str
    layers: list[CutLayer]
    error: float | None  # ‖cut − whole‖² / ‖whole − entering‖² of the block's output, on a sample
    means: dict[str, Tensor] = field(
        default_factory=dict[str, Tensor]
    )  # layer → (in,) fp32, of experts (experts, in): what stands for what is left out

    def to_json(self) -> dict[str, Any]:
        means: dict[str, Any] = {name: mean.tolist() for name, mean in self.means.items()}
        return {"name": self.name, "layers": list(map(asdict, self.layers)), "error": self.error, "means": means}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> CutBlock:
        layers = [CutLayer(**(layer | {"shape": tuple(layer["shape"])})) for layer in entry["layers"]]
        means = {name: torch.tensor(mean, dtype=torch.float32) for name, mean in entry["means"].items()}
        return cls(entry["name"], layers, entry["error"], means)

    def thresholds(self, recipe: ActivationsRecipe) -> Thresholds:
        """Of this block alone."""
        rules = {layer.name: layer.rule for layer in self.layers}
        return Thresholds(recipe.score, recipe.bias, recipe.share, rules, self.means)


@torch.no_grad()
def choose(
    block: Block,
    acts: Activations,
    weights: Sequence[Weight],
    recipe: ActivationsRecipe,
    note: Callable[[str, int], Callable[[], None]],
) -> CutBlock:
    """The rules of a block for what enters it, `acts`; `weights`: those of the layers that leave inputs out. Of several processes
    each takes samples of its windows to the first one, which chooses."""
    if not weights:
        return CutBlock(block.name, [], None)
    ranks, tokens = acts.share.ranks, acts.share.tokens
    inputs = learn_inputs(block, acts, weights)
    layers = Layers(block, recipe, inputs)  # with samples at the first process alone, which chooses
    _measure(block, acts, inputs, recipe, note)
    error = _BlockError(block, acts)  # with samples at the first process alone, too

    def error_at(levels: Levels) -> float:
        return error({name: layers.rule(name, share, exact=False) for name, share in levels.items() if share > 0})

    def choose_levels() -> Levels:
        sizes = layers.sizes(tokens)
        layers.take(list(sizes))
        if recipe.allocation == "greedy" and recipe.share > 0 and len(sizes) > 1:
            return greedy(sizes, recipe.share, error_at)
        return uniform(sizes, recipe.share)

    levels = ranks.known(choose_levels)
    rules: dict[str, Rule] = {}
    for name in levels:
        if name in rules:
            continue
        beside = layers.beside(name)
        anew = bool(rules)
        if anew:
            layers.forget_samples()  # what enters the layers that follow is measured anew
            with cutting(block.module, rules):
                _measure(block, acts, layers.inputs[name], recipe, note)
        rules |= ranks.known(partial(_rules_of, layers, beside, levels, anew))

    def found() -> CutBlock:
        layers.forget_samples()
        made = [
            CutLayer(
                f"{block.name}.{name}", layers.shape(name), levels[name], described(rule), layers.met(name, tokens)
            )
            for name, rule in rules.items()
        ]
        means = {f"{block.name}.{name}": mean.cpu() for name, mean in layers.means().items()}
        return CutBlock(block.name, made, error.relative(error(rules)), means)

    return ranks.known(found)


def _rules_of(layers: Layers, names: Sequence[str], levels: Levels, anew: bool) -> dict[str, Rule]:
    """Of layers that share what enters them, of samples that are there `anew` or were taken before."""
    if anew:
        layers.take(names)
    return {name: layers.rule(name, levels[name], exact=True) for name in names}


def _measure(
    block: Block,
    acts: Activations,
    inputs: Sequence[Input],
    recipe: ActivationsRecipe,
    note: Callable[[str, int], Callable[[], None]],
) -> None:
    """Sample what enters layers."""
    device = block.module.get_parameter(inputs[0].slots[0][0]).device
    advance = note(f"measuring {block.name}", len(acts.hidden))
    for entry in inputs:
        entry.rows.clear()
        entry.calls = None
    calibrate(block, acts, inputs, lambda entry: None, device=device, seed=recipe.seed, advance=advance, sampled=ROWS)


class _BlockError:
    """How far a block's output is off when its layers leave inputs out, on the first windows, which all processes that hold
    some bring to the first one."""

    def __init__(self, block: Block, acts: Activations) -> None:
        self._block = block
        share, here = acts.share, dict[int, tuple[float, tuple[Any, ...], dict[str, Any], Tensor]]()
        with share.ranks.together():
            for batch in range(share.first_batches(GREEDY_TOKENS)):
                if batch in share.numbers:
                    here[batch] = self._seen(acts, share.place(batch))
        found = share.collected(here).values()
        self._change = sum(change for change, *_ in found)
        self._inputs = [(args, kwargs, whole) for _, args, kwargs, whole in found if share.ranks.first]

    def _seen(self, acts: Activations, place: int) -> tuple[float, tuple[Any, ...], dict[str, Any], Tensor]:
        """Of a batch that is held here: how much the block changes, what it is called with and what it makes of that."""
        whole = self._block.call(acts, place)
        entering = acts.hidden[place].to(whole.device)
        change = (whole.float() - entering.float()).square().sum().item()
        return change, *acts.calls[self._block.index][place].bind(entering), whole

    def __call__(self, rules: Mapping[str, Rule]) -> float:
        total = 0.0
        with cutting(self._block.module, rules):
            for args, kwargs, whole in self._inputs:
                total += (unwrap(self._block.module(*args, **kwargs)).float() - whole.float()).square().sum().item()
        return total

    def relative(self, error: float) -> float | None:
        return error / self._change if self._change > 0 else None
