"""What `scores` writes: one safetensors file with the sums of every expert, block and text, and a header that says of which
model and which texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError, RecipeError, did_you_mean
from llmsparse.models.streamed import StreamedModel
from llmsparse.scoring.mixture import Mixture
from llmsparse.scoring.statistics import SUMS, ExpertStatistics
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.home_folder import expand_home, without_home
from llmsparse.storage.shard import bytes_of, read_header, read_into
from llmsparse.text.shares import is_weight

FORMAT = "llmsparse scores 1"
FIELDS = (*SUMS, "peak")


@dataclass(frozen=True)
class ScoresHeader:
    """Of which model, and of which texts."""

    model: str
    experts: dict[str, int]  # block name → number of experts
    routers: dict[str, str]  # on-disk key of some routers → SHA-256 of their bytes
    texts: dict[str, float]  # name → weight
    described: dict[str, Any]  # recipe, protocol of the text, versions

    def metadata(self) -> dict[str, str]:
        known = {"model": self.model, "experts": self.experts, "routers": self.routers, "texts": self.texts}
        text = json.dumps(known | {"described": self.described}, ensure_ascii=False)
        return {"format": FORMAT, "scores": without_home(text)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """ValueError, KeyError or TypeError for what `metadata` does not give back."""
        known: dict[str, Any] = json.loads(metadata["scores"])
        read = cls(**known)
        well = all(
            (
                isinstance(known["model"], str),
                isinstance(known["described"], dict),
                isinstance(known["routers"], dict),
                _is_table(known["experts"], lambda experts: type(experts) is int and 0 < experts < 2**31),
                _is_table(known["texts"], is_weight),
            )
        )
        if not well:
            raise ValueError
        return read


def _is_table(found: Any, takes: Callable[[Any], bool]) -> bool:
    if not isinstance(found, dict):
        return False
    values: list[Any] = list(cast("dict[str, Any]", found).values())
    return bool(values) and all(map(takes, values))


def names_of(block: str, text: int) -> dict[str, str]:
    """Field → tensor name, for the text of this number."""
    return {field: f"{block}/{text}/{field}" for field in (*FIELDS, "seen")}


def specs_of(block: str, texts: int, experts: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What is written of a block."""
    shapes: dict[str, tuple[int, ...]] = {"pairs": (experts, experts), "seen": ()}
    return {
        name: (shapes.get(field, (experts,)), torch.float64)
        for text in range(texts)
        for field, name in names_of(block, text).items()
    }


def tensors_of(block: str, texts: Mapping[str, Any], statistics: Mapping[str, ExpertStatistics]) -> dict[str, Tensor]:
    """Statistics as they are written; a text that no window of was met with has sums of 0."""
    experts = next(iter(statistics.values())).experts
    found: dict[str, Tensor] = {}
    for number, text in enumerate(texts):
        sums = statistics.get(text) or ExpertStatistics.empty(experts)
        names = names_of(block, number)
        found |= {names[field]: getattr(sums, field).cpu() for field in FIELDS}
        found[names["seen"]] = torch.tensor(sums.seen, dtype=torch.float64)
    return found


def router_checksums(model: StreamedModel, reader: CheckpointReader, mixtures: Mapping[int, Mixture]) -> dict[str, str]:
    """Of the routers of the first and the last block that has one: two models of one shape differ there."""
    found: dict[str, str] = {}
    for index in sorted({min(mixtures), max(mixtures)}):
        keys = {weight.key for weight in model.weights(index) if weight.kind == "router"}
        for key, tensor in reader.read(sorted(keys)).items():
            found[key] = hashlib.sha256(bytes_of(tensor)).hexdigest()
    return found


class ScoresFile:
    """A file of scores, its header read. RecipeError for a file that is none."""

    def __init__(self, path: str | Path) -> None:
        self.path = expand_home(path, RecipeError)
        if not self.path.is_file():
            raise RecipeError(f"--scores {path}: no such file; write it with `llmsparse scores MODEL -o FILE`")
        try:
            read = read_header(self.path)
            metadata: Any = json.loads(read.text).get("__metadata__", {})
            if metadata.get("format") != FORMAT:
                raise ValueError
            self.header, self._specs = ScoresHeader.from_metadata(metadata), read.specs
            wanted = {
                name: spec
                for block, experts in self.header.experts.items()
                for name, spec in specs_of(block, len(self.header.texts), experts).items()
            }
            if {name: (spec.shape, spec.dtype) for name, spec in self._specs.items()} != wanted:
                raise ValueError
            damaged = next((name for name in wanted if not self._is_sum(name)), None)
            if damaged is not None:
                raise ValueError(f"{path}: {damaged} is no sum over tokens")
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            why = str(error).partition(": ")[2] or "its header is not what `llmsparse scores` writes"
            raise RecipeError(f"--scores {path}: no scores of experts ({why}); write it anew") from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def statistics(self, block: str) -> dict[str, ExpertStatistics]:
        """Text → sums of a block."""
        found: dict[str, ExpertStatistics] = {}
        for number, text in enumerate(self.header.texts):
            sums = {field: self._read(name) for field, name in names_of(block, number).items()}
            found[text] = ExpertStatistics(float(sums.pop("seen")), **sums)
        return found

    def blend(self, asked: Sequence[str]) -> dict[str, float]:
        """Weights of the texts: those asked for, `NAME@2` or `NAME`, else those that they were measured with. RecipeError for
        a text that is not among them."""
        if not asked:
            return self.header.texts
        found: dict[str, float] = {}
        for text in asked:
            name, at, weight = text.rpartition("@")
            known = text in self.header.texts
            name, value = (text, 1.0) if known or not at else (name, _weight(weight))
            if name not in self.header.texts or value is None:
                names = list(self.header.texts)
                raise RecipeError(
                    f"--blend {text}: no text of {self.path}{did_you_mean(name, names)}; weights go behind an @"
                )
            found[name] = value
        return found

    def check_model(self, model: StreamedModel, reader: CheckpointReader, mixtures: Mapping[int, Mixture]) -> None:
        """RecipeError where these are scores of a model of other experts; or of one with other weights, where some are here."""
        own = {model.block_names[index]: mixture.experts for index, mixture in mixtures.items()}
        if own != self.header.experts:
            raise RecipeError(
                f"--scores {self.path}: of {self.header.model}, which has {_spell(self.header.experts)}; this model has "
                f"{_spell(own)}; measure it with `llmsparse scores`"
            )

        here = all(reader.spec(key).file.is_file() for key in self.header.routers if key in reader.keys())
        if here and router_checksums(model, reader, mixtures) != self.header.routers:
            raise RecipeError(
                f"--scores {self.path}: of {self.header.model}, whose routers are others than this model's; measure it with "
                "`llmsparse scores`"
            )

    def _is_sum(self, name: str) -> bool:
        """Of numbers; of counts and sizes, none is below 0."""
        found, field = self._read(name), name.rpartition("/")[2]
        sizes = found.diagonal() if field == "pairs" else found
        signed = field in ("gates", "additions")  # a gate may have a sign
        return bool(found.isfinite().all()) and (signed or bool((sizes >= 0).all()))

    def _read(self, name: str) -> Tensor:
        spec = self._specs[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        read_into(spec, 0, bytes_of(tensor))
        return tensor


def _weight(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if is_weight(value) else None


def _spell(experts: Mapping[str, int]) -> str:
    counts = sorted(set(experts.values()))
    return f"{' or '.join(map(str, counts))} experts in {len(experts)} layers"
