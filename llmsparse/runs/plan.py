"""What the plans of all verbs share: a streamed model, windows of text, and where and how the run goes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmsparse.models.model_class import pipeline_tag
from llmsparse.models.origin import Origin, config_fingerprint
from llmsparse.models.streamed import StreamedModel
from llmsparse.ranks.group import Ranks
from llmsparse.ranks.launch import joined
from llmsparse.ranks.share import Share
from llmsparse.runs.device import split_batches
from llmsparse.runs.fingerprint import machine, versions
from llmsparse.runs.memory import footprint_bytes
from llmsparse.runs.own_windows import Writing, noted, plan_writing
from llmsparse.runs.planned_recipe import PlannedRecipe
from llmsparse.runs.recipe import RunRecipe, from_arguments
from llmsparse.runs.report import spell_protocol
from llmsparse.runs.streams import Streams
from llmsparse.runs.verbs import VERBS, verb_of
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.disk import spell_size
from llmsparse.text.mix import held_out_parts, names
from llmsparse.text.shares import split_shares
from llmsparse.text.windows import Windows

if TYPE_CHECKING:
    from rich.console import RenderableType


Chosen = TypeVar("Chosen", bound=PlannedRecipe)


@dataclass(frozen=True, kw_only=True)
class RunPlan(ABC, Generic[Chosen]):
    """A run that has passed every check that needs no weights."""

    recipe: Chosen
    origin: Origin
    output: Path
    reader: CheckpointReader
    model: StreamedModel
    windows: Windows
    device: torch.device
    dtype: torch.dtype
    started: float = field(
        default_factory=time.perf_counter, repr=False
    )  # when planning began, for the seconds it took
    config: Any = None  # of what is made, where it is not the source's
    ranks: Ranks = field(default_factory=joined, repr=False)  # the processes that share the work
    threads: int = field(default_factory=torch.get_num_threads, repr=False)  # of each of them
    text_key: ClassVar[str] = "calibration"  # what the recipe calls the text

    @property
    def folder(self) -> Path:
        """The source checkpoint."""
        return self.origin.folder

    @property
    def name(self) -> str:
        return spoken_name(self.recipe.model)

    @property
    def resolved(self) -> Chosen:
        """The recipe with all that `auto`, the model and the hub decided in it: another run of it does the same."""
        return self.recipe.replace(
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            seq_len=self.windows.ids.shape[1],
            batch_size=self.batches[0].shape[0],
            revision=self.origin.commit or self.recipe.revision,
        )

    @cached_property
    def batches(self) -> list[Tensor]:
        return split_batches(self.windows.ids, self.recipe.batch_size, self.device, self.model.hidden_size)

    @cached_property
    def share(self) -> Share:
        """Of the batches, those that this process holds."""
        return self.share_of(self.batches)

    def share_of(self, batches: Sequence[Tensor]) -> Share:
        """Of other ones."""
        return Share(self.ranks, tuple((ids.shape[0], ids.shape[1]) for ids in batches))

    @cached_property
    def held_out(self) -> list[Tensor]:
        """In batches of the same size, so that this one number repeats the run; none of windows of two texts."""
        return [batch for _, batches in self._held_out_of for batch in batches]

    @cached_property
    def texts(self) -> dict[str, float]:
        """What a report calls each text → its weight."""
        shares = split_shares(self.recipe.text_source)
        return {name: share.weight for name, share in zip(names(shares), shares, strict=True)}

    @cached_property
    def texts_of_batches(self) -> list[list[str]]:
        """Batch by batch, the text of every window."""
        owners = list(self.windows.ids_of) or [next(iter(self.texts))] * len(self.windows.ids)
        ends = accumulate(len(batch) for batch in self.batches)
        return [owners[end - len(batch) : end] for batch, end in zip(self.batches, ends, strict=True)]

    def streams(
        self,
        made: StreamedModel | None = None,
        *,
        calibration: bool = True,
        to_head: bool = False,
        aims: bool = False,
    ) -> Streams:
        """All windows before the first block, to be taken through what is made, those of `calibration` if wanted; arguments
        as of `Streams`."""
        texts = [name for name, batches in self._held_out_of for _ in batches]
        batches = self.batches if calibration else []
        return Streams(
            self.model, batches, self.held_out, made, held_out_of=texts, to_head=to_head, aims=aims, ranks=self.ranks
        )

    @cached_property
    def _held_out_of(self) -> list[tuple[str, list[Tensor]]]:
        size = self.batches[0].shape[0]
        parts = held_out_parts(self.windows)
        return [(name, split_batches(part, size, self.device, self.model.hidden_size)) for name, part in parts]

    @cached_property
    @abstractmethod
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of everything that will be written."""

    @cached_property
    @abstractmethod
    def copied(self) -> list[str]:
        """Keys that are copied as they are; the verb makes the others."""

    @property
    def renamed(self) -> dict[str, str]:
        """Keys that are copies of source tensors of another name → that name."""
        return {}

    def added(self) -> dict[str, Tensor]:
        """Tensors that are neither copied nor made of a block."""
        return {}

    @property
    def staging(self) -> str | None:
        """The folder, in the run's state, where the checkpoint is written if the result is made out of it."""
        return None

    @property
    def text_only(self) -> bool:
        """The language model alone is written, of a model that wraps one."""
        return bool(getattr(self.recipe, "text_only", False))

    @property
    def metadata(self) -> dict[str, str]:
        """In the header of every file of tensors."""
        return {"format": "pt"}

    @property
    def versions(self) -> dict[str, str]:
        return versions()

    @property
    def protocol(self) -> dict[str, Any]:
        """Of the text."""
        return self.windows.protocol

    @property
    def trust_remote_code(self) -> bool:
        return bool(getattr(self.recipe, "trust_remote_code", False))

    @property
    def bytes_to_write(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())

    @property
    def bytes_to_download(self) -> int:
        return self.origin.bytes_to_download

    @property
    def bytes_to_read(self) -> int:
        return self.reader.nbytes

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one it resumes."""
        return {
            "recipe": {key: value for key, value in self.recipe.resolved().items() if key != "output"},
            "model": self.reader.fingerprint() | config_fingerprint(self.folder, self.trust_remote_code),
            self.text_key: self.windows.fingerprint,
            "versions": self.versions,
            **machine(self.device),
            "batch size": self.batches[0].shape[0],
        }

    @cached_property
    def footprint(self) -> int:
        """Bytes that the process itself takes, as far as can be known when this is first asked for."""
        return footprint_bytes(self.device)

    @cached_property
    def writing(self) -> Writing | None:
        """How windows are written that the model has yet to write itself; None where all windows are here."""
        unwritten = self.windows.unwritten
        return None if unwritten is None else plan_writing(self, unwritten)

    @abstractmethod
    def memory_bytes(self) -> int:
        """An estimate of the peak, as far as blocks go."""

    @property
    def peak_bytes(self) -> int:
        """An estimate of the peak, of what blocks take or the writing of windows before them."""
        return max(self.memory_bytes(), self.footprint + self.writing.memory_bytes if self.writing else 0)

    def described(self) -> dict[str, Any]:
        """What a report says of the run before it has done anything."""
        return {
            "model": self.name,
            "output": str(self.output),
            "recipe": self.resolved.resolved(),
            "pipeline_tag": pipeline_tag(
                self.config if isinstance(self.config, PretrainedConfig) else self.model.config
            ),
            "protocol": self.protocol,
            "versions": self.versions,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.recipe.model,
            "output": str(self.output),
            "blocks": len(self.model.block_names),
            "bytes_to_download": self.bytes_to_download,
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "memory_bytes": self.peak_bytes,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            self.text_key: self.protocol,
            "batch_size": self.batches[0].shape[0],
        } | ({"writing": noted(self.writing)} if self.writing else {})

    @abstractmethod
    def rows(self, plan: dict[str, Any]) -> dict[str, str]:
        """What will be done, label by label, of what `to_json` says."""

    def of_processes(self, size: int) -> Self:
        """The same plan for so many processes on this machine, which share its threads, as the first of them would make it."""
        return replace(self, ranks=Ranks(0, size, size), threads=max(1, self.threads // size))

    @property
    def _each(self) -> str:
        return f" in each of {self.ranks.size} processes" if self.ranks.size > 1 else ""

    def table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        plan = self.to_json()
        table = Table(box=None, show_header=False, pad_edge=False)
        rows = {
            **self.rows(plan),
            self.text_key: spell_protocol(self.protocol),
            "compute": f"{plan['device']}, {plan['dtype']}, {plan['batch_size']} windows a batch",
            "read, write": f"{spell_size(plan['bytes_to_read'])}, {spell_size(plan['bytes_to_write'])}",
            "memory": f"about {spell_size(plan['memory_bytes'])}{self._each}",
        }
        if self.writing:
            rows["writing"] = self.writing.spell(self.reader.nbytes)
        if self.bytes_to_download:
            rows["download"] = f"{spell_size(self.bytes_to_download)} of weights, not in the cache yet"
        for label, text in rows.items():
            table.add_row(Text(label, style="bold"), Text(text))
        return table


def plan(
    recipe: RunRecipe | str | Path | None = None, *, resume: bool = False, overwrite: bool = False, **keys: Any
) -> RunPlan[Any]:
    """What running a recipe of any verb would do, or `prune` of a model with these keys: `plan("model", sparsity=0.7)`. Nothing
    is written, and no weights are downloaded."""
    verb = verb_of(recipe) if isinstance(recipe, RunRecipe) else VERBS["prune"]
    chosen = from_arguments(verb.load_recipe(), recipe, keys)
    return verb.load_make_plan()(chosen, resume=resume, overwrite=overwrite, download=False)


def spoken_name(model: str) -> str:
    """A model as the user named it, without the path."""
    return Path(model).resolve().name if Path(model).exists() else model
