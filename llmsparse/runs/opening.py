"""How every plan begins and ends: the model is looked at, the text read, and what is not here yet fetched last of all.

opened = open_model(recipe, resume=resume, overwrite=overwrite)
…                                                               # a verb refuses what it cannot do
plan = MyPlan(**opened.fields, windows=read_windows(opened, samples), …)
return fetched(plan, download)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from llmsparse.encodings.reader import open_checkpoint
from llmsparse.models.origin import Origin, fetch_model, load_config, load_tokenizer, look_at_model
from llmsparse.models.streamed import StreamedModel
from llmsparse.runs.device import choose_device, choose_dtype, window_length
from llmsparse.runs.partial import check_output
from llmsparse.runs.plan import Chosen, RunPlan
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.text.kinds import is_token_file
from llmsparse.text.mix import load_mix
from llmsparse.text.shares import split_shares
from llmsparse.text.sources import Purpose
from llmsparse.text.windows import Windows

HELD_OUT_TOKENS = 16384  # for the perplexity in the summary

Planned = TypeVar("Planned", bound=RunPlan[Any])


@dataclass(frozen=True)
class OpenedModel(Generic[Chosen]):
    """A model as `open_model` found it: its config and headers, no weights."""

    recipe: Chosen
    origin: Origin
    output: Path
    config: Any
    reader: CheckpointReader
    model: StreamedModel
    device: torch.device
    dtype: torch.dtype
    started: float
    trust_remote_code: bool

    @property
    def fields(self) -> dict[str, Any]:
        """Those of the plan that is made from it."""
        names = ("recipe", "origin", "output", "reader", "model", "device", "dtype", "started")
        return {name: getattr(self, name) for name in names}


def open_model(
    recipe: Chosen,
    *,
    resume: bool,
    overwrite: bool,
    check: Callable[[Any], object] = lambda config: None,
    dtype_of: Callable[[str, torch.device, CheckpointReader], torch.dtype] = choose_dtype,
) -> OpenedModel[Chosen]:
    """Look at the model of a recipe, its config and headers, and at where the result shall go; downloads no weights.

    `check` refuses a config that the verb can do nothing with, before anything else is looked at.
    Raises RecipeError, CheckpointError or MachineError in one line.
    """
    started = time.perf_counter()
    device, output = choose_device(recipe.device), recipe.output_folder
    check_output(output, resume=resume, overwrite=overwrite)
    origin = look_at_model(recipe.model, recipe.revision)
    check_output(output, resume=resume, overwrite=overwrite, source=origin.folder)
    trusted = bool(getattr(recipe, "trust_remote_code", False))
    config = load_config(origin.folder, trusted, encoded=True)
    check(config)
    window_length(config, recipe.seq_len, recipe.text_source)
    reader = open_checkpoint(origin.folder, origin.absent)
    dtype = dtype_of(recipe.dtype, device, reader)
    model = StreamedModel(reader, device=device, dtype=dtype, trust_remote_code=trusted)
    return OpenedModel(recipe, origin, output, config, reader, model, device, dtype, started, trusted)


def fetched(plan: Planned, download: bool) -> Planned:
    """The plan with the weights that it needs on this machine, where `download` says so: a plan alone needs none.

    They are those of the commit that was looked at, whatever has been pushed since.
    """
    if not plan.origin.absent or not download:
        return plan
    commit = plan.origin.commit
    origin = Origin(fetch_model(plan.recipe.model, commit or plan.recipe.revision), commit=commit)
    reader = open_checkpoint(origin.folder)
    model = StreamedModel(reader, device=plan.device, dtype=plan.dtype, trust_remote_code=plan.trust_remote_code)
    return replace(plan, origin=origin, reader=reader, model=model)


def read_windows(
    opened: OpenedModel[Any],
    samples: int,
    *,
    length: int | None = None,
    purpose: Purpose = "calibration",
    text_key: str = "calibration",
) -> Windows:
    """The windows that a recipe asks for, and others to measure on. CalibrationError or RecipeError in one line.

    `length` is what the recipe and the model's maximum say if not given; `text_key` is what the recipe calls the text.
    """
    recipe, text = opened.recipe, opened.recipe.text_source
    length = length or window_length(opened.config, recipe.seq_len, text)
    stored_tokens = all(is_token_file(share.source) for share in split_shares(text))
    windows = load_mix(
        text,
        None if stored_tokens else load_tokenizer(opened.origin.folder, opened.trust_remote_code),
        seq_len=length,
        samples=samples,
        seed=recipe.seed,
        held_out=held_out_windows(length),
        text_field=recipe.text_field,
        vocabulary=opened.model.vocabulary,
        purpose=purpose,
    )
    window_length(opened.config, windows.ids.shape[1], text)
    recipe.check_text(text_key, windows.fingerprint)
    return windows


def held_out_windows(length: int | None) -> int:
    """How many windows of `length` tokens are measured on."""
    return max(8, min(32, HELD_OUT_TOKENS // (length or 512)))
