"""What the plans of `prune` and `factorize` share: a streamed model, calibration windows, and where and how they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import torch
import transformers
from torch import Tensor

from llmsparse.models.origin import Origin, config_fingerprint, load_tokenizer
from llmsparse.models.streamed import StreamedModel
from llmsparse.runs.device import split_batches, window_length
from llmsparse.runs.report import spell_protocol
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.disk import spell_size
from llmsparse.text import windows as calibration
from llmsparse.text.windows import Windows
from llmsparse.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

HELD_OUT_TOKENS = 16384  # for the perplexity in the summary


class CalibratedRecipe(Protocol):
    """Keys that both recipes have."""

    @property
    def model(self) -> str: ...
    @property
    def calibration(self) -> str: ...
    @property
    def calibration_samples(self) -> int: ...
    @property
    def text_field(self) -> str | None: ...
    @property
    def seq_len(self) -> int | None: ...
    @property
    def batch_size(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def revision(self) -> str | None: ...

    def replace(self, **changes: Any) -> Self: ...
    def resolved(self) -> dict[str, Any]: ...


Chosen = TypeVar("Chosen", bound=CalibratedRecipe)


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
    def held_out(self) -> list[Tensor]:
        """In batches of the same size, so that this one number repeats the run."""
        return split_batches(self.windows.held_out, self.batches[0].shape[0], self.device, self.model.hidden_size)

    @cached_property
    @abstractmethod
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of everything that will be written."""

    @property
    def bytes_to_write(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())

    @property
    def bytes_to_read(self) -> int:
        return sum(spec.end - spec.begin for spec in map(self.reader.spec, self.reader.keys()))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one it resumes."""
        return {
            "recipe": {key: value for key, value in self.recipe.resolved().items() if key != "output"},
            "model": self.reader.fingerprint() | config_fingerprint(self.folder),
            "calibration": self.windows.fingerprint,
            "versions": versions(),
            **machine(self.device),
            "batch size": self.batches[0].shape[0],
        }

    @abstractmethod
    def memory_bytes(self) -> int:
        """An estimate of the peak."""

    def described(self) -> dict[str, Any]:
        """What a report says of the run before it has done anything."""
        return {
            "model": self.name,
            "output": str(self.output),
            "recipe": self.resolved.resolved(),
            "protocol": self.windows.protocol,
            "versions": versions(),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.recipe.model,
            "output": str(self.output),
            "blocks": len(self.model.block_names),
            "bytes_to_download": self.origin.bytes_to_download,
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "memory_bytes": self.memory_bytes(),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "calibration": self.windows.protocol,
            "batch_size": self.batches[0].shape[0],
        }

    @abstractmethod
    def rows(self, plan: dict[str, Any]) -> dict[str, str]:
        """What will be done, label by label, of what `to_json` says."""

    def table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        plan = self.to_json()
        table = Table(box=None, show_header=False, pad_edge=False)
        rows = {
            **self.rows(plan),
            "calibration": spell_protocol(self.windows.protocol),
            "compute": f"{plan['device']}, {plan['dtype']}, {plan['batch_size']} windows a batch",
            "read, write": f"{spell_size(plan['bytes_to_read'])}, {spell_size(plan['bytes_to_write'])}",
            "memory": f"about {spell_size(plan['memory_bytes'])}",
        }
        if self.origin.absent:
            rows["download"] = f"{spell_size(self.origin.bytes_to_download)} of weights, not in the cache yet"
        for label, text in rows.items():
            table.add_row(Text(label, style="bold"), Text(text))
        return table


def calibration_windows(
    recipe: CalibratedRecipe, folder: Path, config: Any, vocabulary: int, trust_remote_code: bool = False
) -> Windows:
    """The windows that a recipe asks for, and others to measure on. CalibrationError or RecipeError in one line."""
    length = window_length(config, recipe.seq_len, recipe.calibration)
    stored_tokens = calibration.is_token_file(recipe.calibration)
    windows = calibration.load_windows(
        recipe.calibration,
        None if stored_tokens else load_tokenizer(folder, trust_remote_code),
        seq_len=length,
        samples=recipe.calibration_samples,
        seed=recipe.seed,
        held_out=held_out_windows(length),
        text_field=recipe.text_field,
        vocabulary=vocabulary,
    )
    window_length(config, windows.ids.shape[1], recipe.calibration)
    return windows


def held_out_windows(length: int | None) -> int:
    """How many windows of `length` tokens are measured on."""
    return max(8, min(32, HELD_OUT_TOKENS // (length or 512)))


def spoken_name(model: str) -> str:
    """A model as the user named it, without the path."""
    return Path(model).resolve().name if Path(model).exists() else model


def machine(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on, beside the versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"threads": torch.get_num_threads(), "device": name}


def versions() -> dict[str, str]:
    return {"llmsparse": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
