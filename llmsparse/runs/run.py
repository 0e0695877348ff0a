"""A run under way: lock, memory, journal, writer, checks, side files, and the final name. The same for every verb.

    with Run(plan, progress, resume=resume, overwrite=overwrite) as run:
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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from llmsparse.encodings.reader import encoding_of, without_encoding
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.models.block import Block
from llmsparse.models.origin import copy_side_files, read_config, write_side_files
from llmsparse.runs.device import full_float32
from llmsparse.runs.memory import PeakMemory
from llmsparse.runs.partial import PartialOutput
from llmsparse.runs.plan import RunPlan
from llmsparse.runs.progress import Progress, Silent
from llmsparse.runs.report import RunReport
from llmsparse.storage.checkpoint import SINGLE, CheckpointReader, CheckpointWriter
from llmsparse.storage.checksum import checksums, read_checked
from llmsparse.storage.disk import disk_error, parse_size
from llmsparse.storage.heap import release_freed

CHECKSUMS = "checksums"  # beside the record in the journal entry of a block
OUTSIDE = "outside the blocks"  # journal entry: everything that is not made has been copied


class Record(Protocol):
    """What the journal keeps of a finished block."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Self: ...


Kind = TypeVar("Kind", bound=Record)
Reported = TypeVar("Reported", bound=RunReport)


@dataclass(frozen=True)
class Made(Generic[Kind]):
    """What a verb made of a block: on-disk key → tensor, each as `plan.tensors` promises it, and what is said of them."""

    tensors: dict[str, Tensor]
    record: Kind


class Run:
    """Everything about a run that is not the verb's own. A context manager; what is not published stays to be resumed."""

    def __init__(
        self,
        plan: RunPlan[Any],
        progress: Progress | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        survey: Callable[[Run], RunPlan[Any]] | None = None,
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

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            plan, self._stack = self.plan, stack
            partial = PartialOutput(plan.output, source=plan.folder, fingerprint=plan.fingerprint, **self._how)
            self._partial = stack.enter_context(partial)
            stack.enter_context(full_float32())
            stack.enter_context(self._memory)
            stack.enter_context(self.progress)
            stack.callback(self._end_writing)
            if self._survey is not None:
                self.plan = self._survey(self)
            self._make_folder()
            if not self.plan.single_file:
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
            self._writer.copy(self.plan.reader, self.plan.copied)
            self._writer.copy(self.plan.reader, self.plan.renamed, named=self.plan.renamed)
            self._writer.write(self.plan.added())
            self._writer.sync()
            self._partial.journal(OUTSIDE, {})

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
        if not self.plan.single_file:
            self._write_side_files(report)
        self._check_written()
        if convert is not None:
            convert(self.folder, self._partial.folder)
            self._measure(report)
        self._partial.publish(SINGLE if self.plan.single_file else None)
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
        entry = self._partial.finished[name]
        try:
            record, expected = kind.from_json(entry), entry[CHECKSUMS]
        except (KeyError, TypeError) as error:
            raise RecipeError(
                f"{self._partial.folder}: another version of llmsparse began this run, and what it noted of {name} "
                "cannot be held against what is on disk; start again with --overwrite"
            ) from error
        return Made(read_checked(self._writer, expected), record)

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
        """Open the finished folder as any reader would and hold each finished block against its checksums."""
        reader = CheckpointReader(self.folder)
        for entry in self._partial.finished.values():
            read_checked(reader, entry.get(CHECKSUMS, {}))  # what was only copied has none
            release_freed()
        missing = set(self.plan.tensors) ^ set(reader.keys())
        if missing:
            raise CheckpointError(
                f"{self.folder}: tensors are missing, or more than were planned, {min(missing)} first; "
                "start again with --overwrite"
            )
