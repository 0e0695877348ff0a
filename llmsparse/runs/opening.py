"""How every plan begins and ends: the model is looked at, the text read, and what is not here yet fetched last of all.

opened = open_model(recipe, resume=resume, overwrite=overwrite)
…                                                               # a verb refuses what it cannot do
plan = MyPlan(**opened.fields, windows=read_windows(opened, samples), …)
return fetched(plan, download)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from llmsparse.encodings.reader import open_checkpoint
from llmsparse.errors import CalibrationError, MachineError
from llmsparse.models.origin import (
    Origin,
    fetch_model,
    has_tokenizer,
    load_config,
    load_tokenizer,
    look_at_model,
    read_config,
)
from llmsparse.models.streamed import StreamedModel
from llmsparse.models.text_only import language_model
from llmsparse.models.thresholds import refuse_cut
from llmsparse.models.untied import untied
from llmsparse.runs.device import choose_device, choose_dtype, window_length
from llmsparse.runs.partial import check_output
from llmsparse.runs.plan import Chosen, PlannedRecipe, RunPlan
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.text.kinds import AUTO, SELF, is_token_file
from llmsparse.text.mix import load_mix
from llmsparse.text.own_text import Starts
from llmsparse.text.shares import split_shares
from llmsparse.text.sources import Purpose, reach_c4
from llmsparse.text.windows import Windows

HELD_OUT_TOKENS = 16384  # for the perplexity in the summary
WITH_C4 = "c4"  # calibrated on by default where C4 can be had

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
    no_c4: MachineError | None = None  # why the default text cannot be had
    new_config: Any = None  # of what is made, where it is not the source's

    @property
    def fields(self) -> dict[str, Any]:
        """Those of the plan that is made from it."""
        names = ("recipe", "origin", "output", "reader", "model", "device", "dtype", "started")
        own = {"config": self.new_config} if self.new_config is not None else {}
        return {name: getattr(self, name) for name in names} | own


def open_model(
    recipe: Chosen,
    *,
    resume: bool,
    overwrite: bool,
    check: Callable[[Any], object] = lambda config: None,
    dtype_of: Callable[[str, torch.device, CheckpointReader], torch.dtype] = choose_dtype,
    reader_of: Callable[[Origin], CheckpointReader] | None = None,
) -> OpenedModel[Chosen]:
    """Look at the model of a recipe, its config and headers, and at where the result shall go; downloads no weights.

    `check` refuses a config that the verb can do nothing with, before anything else is looked at. `reader_of` opens the
    checkpoint of a verb that takes packed ones too.
    Raises RecipeError, CheckpointError or MachineError in one line.
    """
    started = time.perf_counter()
    recipe, no_c4 = _with_text(recipe)
    device, output = choose_device(recipe.device), recipe.output_folder
    look_for = partial(check_output, output, resume=resume, overwrite=overwrite, single_file=recipe.single_file)
    look_for()
    origin = look_at_model(recipe.model, recipe.revision)
    look_for(source=origin.folder)
    trusted = bool(getattr(recipe, "trust_remote_code", False))
    config = load_config(origin.folder, trusted, packed=reader_of is not None, encoded=True)
    refuse_cut(recipe.model, read_config(origin.folder))
    check(config)
    window_length(config, recipe.seq_len, recipe.text_source)
    reader = open_checkpoint(origin.folder, origin.absent) if reader_of is None else reader_of(origin)
    dtype = dtype_of(recipe.dtype, device, reader)
    model, reader, own = _model(reader, recipe, device, dtype, trusted)
    config = model.config if getattr(recipe, "text_only", False) else config
    return OpenedModel(recipe, origin, output, config, reader, model, device, dtype, started, trusted, no_c4, own)


def _model(
    reader: CheckpointReader, recipe: PlannedRecipe, device: torch.device, dtype: torch.dtype, trusted: bool
) -> tuple[StreamedModel, CheckpointReader, Any]:
    """The model that is worked on, the reader of its tensors, and its config where the result has another: the model of the
    checkpoint, the language model in it, or the same model with a head of its own."""
    model = StreamedModel(reader, device=device, dtype=dtype, trust_remote_code=trusted)
    if getattr(recipe, "text_only", False):
        model, reader = language_model(model, reader)
        return model, reader, model.config
    if getattr(recipe, "head_bits", None) is not None and model.tied_head is not None:
        return untied(model, reader, trusted)
    return model, reader, None


def _with_text(recipe: Chosen) -> tuple[Chosen, MachineError | None]:
    """A recipe that leaves its text to be chosen, with what is chosen: C4 where it can be had, or why it cannot."""
    if recipe.text_source != AUTO:
        return recipe, None
    try:
        reach_c4()
    except MachineError as error:
        return recipe.replace(calibration=SELF), error
    return recipe.replace(calibration=WITH_C4), None


def fetched(plan: Planned, download: bool) -> Planned:
    """The plan with the weights that it needs on this machine, where `download` says so: a plan alone needs none.

    They are those of the commit that was looked at, whatever has been pushed since.
    """
    if not plan.origin.absent or not download:
        return plan
    commit = plan.origin.commit
    origin = Origin(fetch_model(plan.recipe.model, commit or plan.recipe.revision), commit=commit)
    reader = open_checkpoint(origin.folder)
    model, reader, _ = _model(reader, plan.recipe, plan.device, plan.dtype, plan.trust_remote_code)
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
    shares = [share.source for share in split_shares(text)]
    length = length or window_length(opened.config, recipe.seq_len, text)
    tokenizer = _tokenizer(opened, shares)
    where, config = str(opened.recipe.model), opened.config.get_text_config()
    try:
        starts = Starts.find(tokenizer, config, opened.model.vocabulary, where) if SELF in shares else None
    except CalibrationError as error:
        raise opened.no_c4 or error from None
    windows = load_mix(
        text,
        tokenizer,
        seq_len=length,
        samples=samples,
        seed=recipe.seed,
        held_out=held_out_windows(length),
        text_field=recipe.text_field,
        bos=recipe.bos,
        vocabulary=opened.model.vocabulary,
        starts=starts,
        purpose=purpose,
    )
    window_length(opened.config, windows.ids.shape[1], text)
    if opened.no_c4 is not None:
        note = (
            f"{str(opened.no_c4).partition(':')[0]}, so the model writes its text itself; name one with --calibration"
        )
        windows = replace(windows, protocol=windows.protocol | {"note": note})
    if windows.unwritten is None:
        recipe.check_text(text_key, windows.fingerprint)
    return windows


def _tokenizer(opened: OpenedModel[Any], sources: Sequence[str]) -> Any:
    """The model's, None where no source needs one: stored tokens do not, and what the model writes can do without."""
    needed = {source for source in sources if not is_token_file(source)}
    if not needed or (needed == {SELF} and not has_tokenizer(opened.origin.folder)):
        return None
    return load_tokenizer(opened.origin.folder, opened.trust_remote_code)


def held_out_windows(length: int | None) -> int:
    """How many windows of `length` tokens are measured on."""
    return max(8, min(32, HELD_OUT_TOKENS // (length or 512)))
