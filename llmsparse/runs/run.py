"""A run under way: lock, memory, journal, writer, checks, side files, and the final name. The same for every verb.

    with Run(plan, progress, resume=resume, overwrite=overwrite) as run:
        plan = run.plan                                          # with all its windows
        run.copy_the_rest()
        for block in run.blocks():
            run.block(block.name, Record, lambda: make(block))   # made now and written, or recalled
        return run.publish(report)

What a verb makes of a block is hashed, written and synced by a thread while the next block is worked on; it stands in
the journal once it would survive a power cut. So what is killed can be resumed to the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor

from llmsparse.encodings.reader import encoding_of, without_encoding
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.models.block import Block
from llmsparse.models.origin import copy_side_files, read_config, write_side_files
from llmsparse.runs.device import full_float32
from llmsparse.runs.memory import PeakMemory
from llmsparse.runs.own_windows import CACHED, Writing, noted, store_own_windows, write_own_windows
from llmsparse.runs.partial import PartialOutput
from llmsparse.runs.plan import RunPlan
from llmsparse.runs.progress import Progress, Silent
from llmsparse.runs.report import RunReport
from llmsparse.storage.checkpoint import SINGLE, CheckpointReader, CheckpointWriter
from llmsparse.storage.checksum import check_stored, checksums, read_checked
from llmsparse.storage.disk import disk_error, parse_size
from llmsparse.text.mix import own_windows

CHECKSUMS = "checksums"  # beside the record in the journal entry of a block
OUTSIDE = "outside the blocks"  # journal entry: everything that is not made has been copied


class Record(Protocol):
    """What the journal keeps of a finished block."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Self: ...


Kind = TypeVar("Kind", bound=Record)
Reported = TypeVar("Reported", bound=RunReport)
Plan = TypeVar("Plan", bound=RunPlan[Any])


@dataclass(frozen=True)
class Made(Generic[Kind]):
    """What a verb made of a block: on-disk key → tensor, each as `plan.tensors` promises it, and what is said of them."""

    tensors: dict[str, Tensor]
    record: Kind


class Run(Generic[Plan]):
    """Everything about a run that is not the verb's own. A context manager; what is not published stays to be resumed."""

    def __init__(
        self,
        plan: Plan,
        progress: Progress | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        survey: Callable[[Run[Plan]], Plan] | None = None,
    ) -> None:
        """`survey` finds out, before a file is made, what the shape of the result depends on: the plan that it returns is
        carried out. What it found it notes as a `fact`."""
        self.plan = plan
        self._survey = survey
        self.progress = progress or Silent()
        self._memory = PeakMemory(plan.device)
        self._behind = ThreadPoolExecutor(1, "llmsparse-write-behind")
        self._writing: Future[None] | None = None
        self._stack = ExitStack()
        self._how = {"resume": resume, "overwrite": overwrite}
        self._wrote = plan.windows.unwritten is not None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            plan, self._stack = self.plan, stack
            partial = PartialOutput(
                plan.output,
                source=plan.folder,
                fingerprint=plan.fingerprint,
                single_file=plan.recipe.single_file,
                **self._how,
            )
            self._partial = stack.enter_context(partial)
            stack.enter_context(full_float32())
            stack.enter_context(self._memory)
            stack.enter_context(self.progress)
            stack.callback(self._end_writing)
            self._write_own_windows()
            if self._survey is not None:
                self.plan = self._survey(self)
            self._make_folder()
            if not self.plan.recipe.single_file:
                copy_side_files(self.plan.folder, self.folder)
            self._write_config()
            self._writer = CheckpointWriter(
                self.folder,
                self.plan.tensors,
                parse_size(self.plan.recipe.max_shard_size),
                resuming=self.has(OUTSIDE),
                metadata=self.plan.metadata,
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        writing = self._writing
        self._stack.__exit__(kind, error, trace)
        if error is not None and writing is not None and (lost := writing.exception()) is not None:
            error.add_note(f"beside it, the block before could not be written: {lost}")

    def _end_writing(self) -> None:
        """A block that is being written will be in the journal; until then the lock stays, however often Ctrl-C comes."""
        while True:
            try:
                return self._behind.shutdown(wait=True)
            except KeyboardInterrupt:
                continue

    @property
    def folder(self) -> Path:
        """Where the checkpoint is written: OUT.partial, or inside its state where the result is made from it."""
        staging = self.plan.staging
        return self._partial.state / staging if staging else self._partial.folder

    @property
    def state(self) -> Path:
        """Where a verb may keep what it needs to go on."""
        return self._partial.state

    def has(self, name: str) -> bool:
        """Whether a block, or a fact, is in the journal."""
        return name in self._partial.finished

    def copy_the_rest(self) -> None:
        """Copy what the verb does not make from the source, byte for byte; once, whatever the number of resumes."""
        self.settle()
        if not self.has(OUTSIDE):
            added = self.plan.added()
            sums = self._writer.copy(self.plan.reader, self.plan.copied)
            sums |= self._writer.copy(self.plan.reader, self.plan.renamed, named=self.plan.renamed)
            self._writer.write(added)
            self._writer.sync()
            self._partial.journal(OUTSIDE, {CHECKSUMS: sums | checksums(added)})

    def blocks(self, head: bool = False) -> Iterator[Block]:
        """The source's blocks one after the other, announced, and if asked its untied output head as the last; each is
        evicted when the next one is asked for."""
        model = self.plan.model
        self.progress.start(len(model.block_names) + head)
        blocks = model.blocks()
        self._stack.callback(blocks.close)  # also where the loop is left by an error
        for block in blocks:
            self.progress.block(block.name)
            yield block
        if head and (last := model.head()) is not None:
            self.progress.block(last.name)
            yield last

    def block(self, name: str, kind: type[Kind], make: Callable[[], Made[Kind]]) -> Made[Kind]:
        """A block: made now, and written behind; or read back from an interrupted run, held against its checksums."""
        if self.has(name):
            return self._recall(name, kind)
        if self._writing is not None and self._writing.done():
            self.settle()  # a disk that failed ends the run before more is made
        made = make()
        self.settle()
        self._writing = self._behind.submit(self._store, name, made)
        return made

    def fact(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Something that was found once and is noted in the journal, so that a resumed run goes on with it."""
        self.settle()
        if not self.has(name):
            self._partial.journal(name, find())
        return self._partial.finished[name]

    def settle(self) -> None:
        """Return when all that was made is on disk, and in the journal."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def publish(self, report: Reported, convert: Callable[[Path, Path], None] | None = None) -> Reported:
        """Finish the report, write the side files, check what was made and that all is there, and give the folder its name.

        `convert(folder, target)` makes the result out of what lies in the staging folder, where the plan has one.
        """
        self.settle()
        self._writer.finish()
        report.warn()
        self._measure(report)
        if not self.plan.recipe.single_file:
            self._write_side_files(report)
        self._check_written()
        if convert is not None:
            convert(self.folder, self._partial.folder)
            self._measure(report)
        if self._wrote and not self.plan.recipe.single_file:
            store_own_windows(self.state, self._partial.folder)
        self._partial.publish(SINGLE if self.plan.recipe.single_file else None)
        return report

    def _write_side_files(self, report: RunReport) -> None:
        notes = {"threads": torch.get_num_threads(), f"{self.plan.text_key} sha256": self.plan.windows.fingerprint}
        text = self.plan.resolved.dump(self.plan.versions | notes, self.plan.output)
        write_side_files(self.folder, recipe=text, report=report.stored(), card=report.card())

    def _measure(self, report: RunReport) -> None:
        report.seconds = time.perf_counter() - self.plan.started
        report.peak_memory_bytes = self._memory.read()

    def _store(self, name: str, made: Made[Any]) -> None:
        sums = checksums(made.tensors)
        self._writer.write(made.tensors)
        self._writer.sync()
        self._partial.journal(name, made.record.to_json() | {CHECKSUMS: sums})

    def _recall(self, name: str, kind: type[Kind]) -> Made[Kind]:
        try:
            record = kind.from_json(self._partial.finished[name])
        except (KeyError, TypeError) as error:
            raise self._not_ours(name) from error
        expected = self._sums(name)
        if not expected:
            raise self._not_ours(name)
        return Made(read_checked(self._writer, expected), record)

    def _sums(self, name: str) -> dict[str, str]:
        """Key → checksum of what the journal notes under a name; a fact has none."""
        sums: Any = self._partial.finished[name].get(CHECKSUMS, {})
        if not isinstance(sums, dict):
            raise self._not_ours(name)
        return cast(dict[str, str], sums)

    def _not_ours(self, name: str) -> RecipeError:
        return RecipeError(
            f"{self._partial.folder}: another version of llmsparse began this run, and what it noted of {name} "
            "cannot be held against what is on disk; start again with --overwrite"
        )

    def _write_own_windows(self) -> None:
        """Have the model write the windows that it is to write itself: from here on the plan has them all."""
        plan, unwritten = self.plan, self.plan.windows.unwritten
        if unwritten is None or plan.writing is None:
            return
        begun = noted(plan.writing)
        writing = Writing(**self.fact(CACHED, lambda: begun))
        if writing.segment is not None:
            self.progress.log(f"calibration: {writing.spell(plan.reader.nbytes)}")
        steps = partial(self.progress.batches, "writing windows")
        ids = write_own_windows(plan, unwritten, writing, self.state, steps)
        windows = replace(own_windows(unwritten, ids), protocol=plan.windows.protocol)
        self.plan = replace(plan, windows=windows)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def _write_config(self) -> None:
        file = self.folder / "config.json"
        try:
            if self.plan.config is not None:
                self.plan.config.save_pretrained(self.folder)
            elif encoding_of(config := read_config(self.plan.folder)) is not None:
                file.write_text(json.dumps(without_encoding(config), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise disk_error(file, error) from error

    def _check_written(self) -> None:
        """Open the finished folder as any reader would and hold what is in it against its checksums."""
        reader = CheckpointReader(self.folder)
        sums = {key: found for name in self._partial.finished for key, found in self._sums(name).items()}
        check_stored(reader, sums)
        copied = {*self.plan.copied, *self.plan.renamed, *self.plan.added()}  # these had no checksums once
        missing = set(self.plan.tensors) ^ set(reader.keys()) or self.plan.tensors.keys() - sums.keys() - copied
        if missing:
            raise CheckpointError(
                f"{self.folder}: tensors are missing, or more than were planned, {min(missing)} first; "
                "start again with --overwrite"
            )
