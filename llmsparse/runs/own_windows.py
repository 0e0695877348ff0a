"""The windows of a run that the model writes itself: how it will, what that takes, and where they are kept.

Written once, as a run begins, into its state, so that what is resumed goes on with the same; stored beside the result, in
a folder of its own, for whoever loads all weights of a folder must not take tokens for some.
"""

# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false
from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmsparse.models.streamed import StreamedModel
from llmsparse.models.writing import Chooser, write_streamed, write_whole
from llmsparse.runs.memory import available_bytes
from llmsparse.runs.recipe_paths import STORED
from llmsparse.storage.disk import disk_error, fsync, spell_size
from llmsparse.text.own_text import TEMPERATURE, Unwritten

if TYPE_CHECKING:
    from llmsparse.runs.plan import RunPlan

CACHED = "self.safetensors"  # inside the state of a run
AT_ONCE = 128  # windows written side by side, fewer where their caches are large
CACHE_SHARE = 0.2  # of the memory that is free, for what is kept of earlier tokens
WHOLE_SHARE = 0.7  # of the memory that is free, for a model that is held whole
SEGMENT = 64  # tokens of which a model that is not held whole writes a window, one segment behind the other


@dataclass(frozen=True)
class Writing:
    """How windows are written: with the model held whole, `at_once` side by side; or streamed, in segments of so many
    tokens, the whole model read `reads` times."""

    windows: int
    at_once: int
    segment: int | None
    reads: int
    memory_bytes: int

    def spell(self, checkpoint_bytes: int) -> str:
        if self.segment is None:
            return f"{self.windows} windows by the model, held whole, {self.at_once} at once"
        return (
            f"{self.windows} windows by the model, which is too large to be held whole: in segments of {self.segment} tokens, "
            f"for which it is read {self.reads} times, {spell_size(self.reads * checkpoint_bytes)}; text for --calibration "
            "takes none of that"
        )


def plan_writing(plan: RunPlan[Any], unwritten: Unwritten) -> Writing:
    """How the windows of a plan will be written, by the memory that is free now."""
    free, count, length = available_bytes(plan.device), unwritten.windows, unwritten.length
    parts = _parts(plan.model)
    weights = sum(math.prod(plan.reader.spec(key).shape) for keys in parts for key in keys) * plan.dtype.itemsize
    kept = _kept_of_a_token(plan.model, plan.dtype) * length
    most = min(AT_ONCE, max(1, int(CACHE_SHARE * free) // kept))
    at_once = -(-count // -(-count // most))  # as many in every batch
    logits = plan.model.vocabulary * (plan.dtype.itemsize + 3 * 4)
    largest = max((_stored(plan, keys) for keys in parts), default=0)
    whole = weights + largest + at_once * (kept + logits)
    if whole <= WHOLE_SHARE * free:
        return Writing(count, at_once, None, 1, whole)
    pieces = count * -(-length // SEGMENT)
    streamed = pieces * (SEGMENT * plan.model.hidden_size * plan.dtype.itemsize + logits) + 2 * largest
    return Writing(count, plan.batches[0].shape[0], SEGMENT, SEGMENT - 1, streamed)


def write_own_windows(
    plan: RunPlan[Any],
    unwritten: Unwritten,
    writing: Writing,
    state: Path,
    advance: Callable[[int], Callable[[], None]],
) -> Tensor:
    """(windows, length) int64, from the state of an interrupted run, or written now and put there.

    `advance(steps)` is told of so many steps to come, and what it gives back of each.
    """
    file = state / CACHED
    if not file.is_file():
        ids = _write(plan.model, unwritten, writing, advance)
        draft = file.with_name(f"{CACHED}.draft")
        try:
            save_file({"input_ids": ids.contiguous()}, draft)
            fsync(draft)
            draft.replace(file)
        except OSError as error:
            raise disk_error(file, error, ids.nbytes) from error
    return load_file(file)["input_ids"]


def store_own_windows(state: Path, folder: Path) -> None:
    """Put what the model wrote beside the result."""
    target = folder / STORED
    try:
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(state / CACHED, target)
    except OSError as error:
        raise disk_error(target, error) from error


def _write(
    model: StreamedModel, unwritten: Unwritten, writing: Writing, advance: Callable[[int], Callable[[], None]]
) -> Tensor:
    starts, length, seed = unwritten.starts, unwritten.length, unwritten.seed
    if writing.segment is not None:
        pieces = -(-length // writing.segment)
        chooser = _chooser(unwritten, starts.prefixes(writing.windows * pieces, seed), 0)
        ids = write_streamed(model, chooser, writing.segment, writing.at_once, advance(writing.segment - 1))
        return ids.view(writing.windows, -1)[:, :length]
    steps = advance((length - 1) * -(-writing.windows // writing.at_once))
    prefixes = starts.prefixes(writing.windows, seed).split(writing.at_once)
    parts = [write_whole(model, _chooser(unwritten, part, n), length, steps) for n, part in enumerate(prefixes)]
    return torch.cat(parts)


def _chooser(unwritten: Unwritten, prefixes: Tensor, number: int) -> Chooser:
    generator = torch.Generator().manual_seed(unwritten.seed + number)
    return Chooser(prefixes, TEMPERATURE, generator, unwritten.starts.first, unwritten.starts.end)


def _kept_of_a_token(model: StreamedModel, dtype: torch.dtype) -> int:
    """Bytes that attention keeps of a token: keys and values of every block, as far as the config tells."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or -(-model.hidden_size // heads)
    heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * len(model.block_names) * heads * width * dtype.itemsize


def _parts(model: StreamedModel) -> list[list[str]]:
    return [
        *(model.block_keys(index) for index in range(len(model.block_names))),
        *([key] for key in model.outside_keys),
    ]


def _stored(plan: RunPlan[Any], keys: list[str]) -> int:
    """Bytes of tensors as they are on disk, on their way into the model."""
    return sum(spec.end - spec.begin for spec in map(plan.reader.spec, keys))


def noted(writing: Writing) -> dict[str, Any]:
    """For the journal: what is resumed writes as was begun."""
    return asdict(writing)
