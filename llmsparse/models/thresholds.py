"""Which inputs of its linear layers a checkpoint leaves out for a token, and a model that runs so.

It stands in config.json under a key of our own, which other software passes over: to it the model is the dense one.

    "llmsparse": {"activations": {"version": 1, "score": "wina", "bias": "centre", "sparsity": 0.5,
                                  "layers": {"model.layers.0.mlp.up_proj": {"threshold": 0.71}, …}}}

The experts of a mixture are one layer, with a threshold each: `"model.layers.0.mlp.experts.down_proj": {"threshold": [0.4, …]}`.
Beside it, in `llmsparse_activations.st`, a safetensors file that only we read, is what stands for inputs that are left out, a
number each, of experts a row each: their centre, or what is lost on average. Norms of columns and biases are computed from the
weights.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.sparsity.activation import Cut, Score, column_norms
from llmsparse.storage.disk import disk_error
from llmsparse.storage.shard import bytes_of, lay_out, read_header, read_into

OWN = "llmsparse"  # our key of config.json
KEY = "activations"
VERSION = 1
MEANS = "llmsparse_activations.st"
Bias = Literal["none", "fold", "centre"]
AGAIN = "run `llmsparse activations` again"
BELONG = "the two do not belong together"


@dataclass(frozen=True)
class Applied:
    """The rule of a layer with all that it needs, on the layer's device."""

    cut: Cut
    added: Tensor | None  # (out,) in the dtype of the weight: its product with what stands for inputs left out

    def bias(self, own: Tensor | None) -> Tensor | None:
        """What is added to the product, besides a layer's own bias."""
        if self.added is None or own is None:
            return own if self.added is None else self.added
        return self.added + own


ExpertRules = tuple[Applied, ...]  # of one parameter of a module of experts, by expert
Rule = Applied | ExpertRules


@dataclass(frozen=True)
class Thresholds:
    """Of every layer that leaves inputs out: its name in the model → {"threshold": t} or {"keep": k}; of experts a list of t."""

    score: Score
    bias: Bias
    sparsity: float  # share of the inputs left out, weighed by the weights that they are multiplied with
    layers: dict[str, dict[str, Any]]
    means: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # layer → (in,) fp32; of experts (experts, in)

    def to_json(self) -> dict[str, Any]:
        known = {"version": VERSION, "score": self.score, "bias": self.bias, "sparsity": self.sparsity}
        return {KEY: known | {"layers": self.layers}}

    def write_means(self, folder: Path) -> None:
        """Nothing where there are none."""
        file = folder / MEANS
        if not self.means:
            return
        header, specs = lay_out(file, {name: (tuple(mean.shape), mean.dtype) for name, mean in self.means.items()})
        try:
            with file.open("wb") as stream:
                stream.write(header)
                for name in specs:
                    stream.write(bytes_of(self.means[name].contiguous()))
        except OSError as error:
            raise disk_error(file, error) from error

    def apply(self, name: str, weight: Tensor) -> Applied:
        """The rule of a layer, made of its weight (out, in). CheckpointError where it does not belong to it."""
        rule, mean = self.layers[name], self.means.get(name)
        if isinstance(rule.get("threshold"), list):
            raise CheckpointError(
                f"{name}: config.json gives {len(rule['threshold'])} thresholds for one matrix, wanted a number; {AGAIN}"
            )
        _check_width(name, rule, mean, tuple(weight.shape[1:]), weight.shape[1])
        return applied(rule, self.score, self.bias, mean, weight)

    def apply_experts(self, name: str, weights: Iterable[Tensor], count: int) -> ExpertRules:
        """The same of a parameter that holds a matrix for each of `count` experts: `weights` (out, in) in their order, which
        are let go of one by one."""
        rule, means = self.layers[name], self.means.get(name)
        thresholds = rule.get("threshold")
        if isinstance(thresholds, list) and len(thresholds) != count:
            raise CheckpointError(
                f"{name}: config.json gives {len(thresholds)} thresholds for {count} experts; {BELONG}"
            )
        made: list[Applied] = []
        for expert, weight in enumerate(weights):
            own = {"threshold": thresholds[expert]} if isinstance(thresholds, list) else rule
            _check_width(name, own, means, (count, weight.shape[1]), weight.shape[1])
            made.append(applied(own, self.score, self.bias, None if means is None else means[expert], weight))
        return tuple(made)

    def of_block(self, block: str) -> Iterator[str]:
        """The layers of a block, without its name."""
        for name in self.layers:
            if name.startswith(block + "."):
                yield name.removeprefix(block + ".")


@torch.no_grad()
def applied(rule: Mapping[str, Any], score: Score, how: Bias, mean: Tensor | None, weight: Tensor) -> Applied:
    """`rule`: of the layer, as in config.json; `mean` (in,) fp32 where `how` is not none."""
    mean = None if mean is None else mean.to(weight.device)
    norms = column_norms(weight) if score == "wina" else None
    cut = Cut(**rule, norms=norms, centre=mean if how == "centre" else None)
    return Applied(cut, None if mean is None else folded(weight, mean))


def folded(weight: Tensor, mean: Tensor) -> Tensor:
    """What `mean` (in,) adds to a product, (out,)."""
    return (weight.float() @ mean).to(weight.dtype)


def _check_width(name: str, rule: Mapping[str, Any], mean: Tensor | None, wanted: tuple[int, ...], width: int) -> None:
    """CheckpointError for a rule, or what stands for inputs left out, of a matrix of other inputs."""
    if mean is not None and mean.shape != wanted:
        raise CheckpointError(
            f"{name}: {MEANS} has {list(mean.shape)} inputs of it, the weight {list(wanted)}; {BELONG}"
        )
    if rule.get("keep", 0) > width:
        raise CheckpointError(
            f"{name}: config.json lets {rule['keep']} inputs of a token count, and the weight has {width}; {BELONG}"
        )


def read_thresholds(folder: Path, config: Mapping[str, Any]) -> Thresholds | None:
    """Of the checkpoint in `folder`, whose config.json says `config`; None where it leaves nothing out. CheckpointError for what
    cannot be understood, for lack of sense or because a later llmsparse wrote it."""
    block = block_of(config)
    if block is None:
        return None
    file = folder / "config.json"
    version = block.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{file}: its activations are cut in version {version}, this llmsparse reads up to {VERSION}; install a newer one"
        )
    layers: Any = block.get("layers")
    score: Any = block.get("score")
    bias: Any = block.get("bias")
    sparsity: Any = block.get("sparsity")
    known = score in get_args(Score) and bias in get_args(Bias) and _is_number(sparsity, 1)
    rules = isinstance(layers, dict) and bool(layers) and all(map(_is_rule, layers.values()))
    if version != VERSION or not known or not rules:
        raise CheckpointError(f"{file}: llmsparse.activations is damaged; {AGAIN}")
    if bias == "none" and (folder / MEANS).exists():
        raise CheckpointError(f"{file}: says that nothing stands for inputs left out, and {MEANS} what does; {BELONG}")
    means = {} if bias == "none" else _read_means(folder, layers)
    return Thresholds(score, bias, float(sparsity), layers, means)


def block_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a config.json says of activations, empty where that is damaged; None where it says nothing."""
    own: Any = config.get(OWN, {})
    if isinstance(own, dict) and KEY not in own:
        return None
    block: Any = own[KEY] if isinstance(own, dict) else None
    return block if isinstance(block, dict) else {}


def refuse_cut(model: str, config: Mapping[str, Any]) -> None:
    """CheckpointError for a model that leaves inputs out: thresholds hold for the weights that they were chosen with."""
    if block_of(config) is not None:
        raise CheckpointError(
            f"{model}: has thresholds of activations already, chosen for its weights as they are; start from the model that it "
            "was made of, and run `llmsparse activations` last"
        )


def _is_rule(rule: Any) -> bool:
    if not isinstance(rule, dict) or len(rule) != 1:
        return False
    threshold, keep = rule.get("threshold"), rule.get("keep")
    numbers: list[Any] = threshold if isinstance(threshold, list) else [threshold]
    finite = [_is_number(number, torch.finfo(torch.float32).max) for number in numbers]
    return (bool(finite) and all(finite)) or (type(keep) is int and keep >= 0)


def _is_number(value: Any, most: float) -> bool:
    """Of at most that size; no NaN, and no whole number that is more than a float can be."""
    return type(value) in (int, float) and -most <= value <= most


def _read_means(folder: Path, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    specs = read_header(folder / MEANS).specs
    for name in sorted(specs.keys() - layers.keys()):
        raise CheckpointError(
            f"{folder / MEANS}: holds the inputs of {name}, which config.json gives no rule; {BELONG}"
        )
    for name in layers:
        if name not in specs or specs[name].dtype != torch.float32 or len(specs[name].shape) not in (1, 2):
            raise CheckpointError(f"{folder / MEANS}: does not hold the inputs of {name}; the folder is incomplete")
    found = {name: torch.empty(specs[name].shape) for name in layers}
    for name, mean in found.items():
        read_into(specs[name], 0, bytes_of(mean))
        if not bool(mean.isfinite().all()):
            raise CheckpointError(f"{folder / MEANS}: the inputs of {name} are NaN or Inf; {AGAIN}")
    return found
