"""What a run leaves on disk: by the process that writes, the first one, and as the other processes of a run see it.

The writing process holds the lock, the journal and the checkpoint; a block is hashed, written and synced by a thread
while the next one is worked on. Another process only remembers what is in the journal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor

from llmsparse.encodings.reader import encoding_of, without_encoding
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.models.origin import WRITTEN, copy_side_files, read_config, write_side_files
from llmsparse.models.text_only import READERS
from llmsparse.runs.own_windows import store_own_windows
from llmsparse.runs.partial import STATE_FOLDER, PartialOutput
from llmsparse.runs.plan import RunPlan
from llmsparse.runs.report import RunReport
from llmsparse.storage.checkpoint import SINGLE, CheckpointReader, CheckpointWriter
from llmsparse.storage.checksum import check_stored, checksums, read_checked
from llmsparse.storage.disk import disk_error, parse_size

CHECKSUMS = "checksums"  # beside the record in the journal entry of a block
OUTSIDE = "outside the blocks"  # journal entry: everything that is not made has been copied

Entry = dict[str, Any]  # of the journal: what it notes under a name
Convert = Callable[[Path, Path], None]


class Output(Protocol):
    """A run's result on its way to disk. A context manager, which keeps what is not published to be resumed."""

    finished: dict[str, Entry]
    state: Path

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, plan: RunPlan[Any]) -> None:
        """Make the folder of what `plan` promises, with all files that can be written already."""
        ...

    def copy_the_rest(self, plan: RunPlan[Any]) -> None:
        """Copy what the verb does not make, byte for byte, unless that is done."""
        ...

    def note(self, name: str, entry: Entry) -> None: ...

    def store(self, name: str, tensors: Mapping[str, Tensor], entry: Entry) -> None:
        """Begin to write a block, once the one before it is written; its entry is in the journal when it is on disk."""
        ...

    def refuse_lost(self) -> None:
        """Raise what the writing of a block has ended in, if it has; does not wait."""
        ...

    def settle(self) -> None:
        """Return when all that was stored is on disk, and in the journal."""
        ...

    def recall(self, name: str) -> dict[str, Tensor]:
        """The tensors of a block that is in the journal, held against their checksums. Asked of the process that writes."""
        ...

    def publish(
        self, plan: RunPlan[Any], report: RunReport, measure: Callable[[], None], convert: Convert | None
    ) -> None:
        """Write the side files, check what was made and that all is there, make the result out of it where `convert` does,
        and give it its name. `measure` puts time and memory into the report."""
        ...


class WrittenElsewhere:
    """The output as a process sees it that does not write: `finished` is what the journal held as the run began."""

    def __init__(self, out: Path, finished: Mapping[str, Entry]) -> None:
        self.finished = dict(finished)
        self.state = out.with_name(out.name + ".partial") / STATE_FOLDER

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, plan: RunPlan[Any]) -> None: ...

    def copy_the_rest(self, plan: RunPlan[Any]) -> None: ...

    def note(self, name: str, entry: Entry) -> None:
        self.finished[name] = entry

    def store(self, name: str, tensors: Mapping[str, Tensor], entry: Entry) -> None:
        self.finished[name] = entry

    def refuse_lost(self) -> None: ...

    def settle(self) -> None: ...

    def recall(self, name: str) -> dict[str, Tensor]:
        raise AssertionError("what is on disk is read by the process that wrote it")

    def publish(
        self, plan: RunPlan[Any], report: RunReport, measure: Callable[[], None], convert: Convert | None
    ) -> None: ...


class Written:
    """The output of the process that writes."""

    def __init__(self, plan: RunPlan[Any], *, resume: bool, overwrite: bool) -> None:
        self._partial = PartialOutput(
            plan.output,
            source=plan.folder,
            fingerprint=plan.fingerprint,
            single_file=plan.recipe.single_file,
            resume=resume,
            overwrite=overwrite,
        )
        self._own_windows = plan.windows.unwritten is not None
        self.finished, self.state = self._partial.finished, self._partial.state
        self._behind = ThreadPoolExecutor(1, "llmsparse-write-behind")
        self._writing: Future[None] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._partial)
        self._stack.callback(self._end_writing)
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

    def begin(self, plan: RunPlan[Any]) -> None:
        folder = result_folder(plan, self.state)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(folder, error) from error
        if not plan.recipe.single_file:
            copy_side_files(plan.folder, folder, (*WRITTEN, *READERS) if plan.text_only else WRITTEN)
        _write_config(plan, folder)
        size, resuming = parse_size(plan.recipe.max_shard_size), OUTSIDE in self.finished
        self._writer = CheckpointWriter(folder, plan.tensors, size, resuming=resuming, metadata=plan.metadata)

    def copy_the_rest(self, plan: RunPlan[Any]) -> None:
        if OUTSIDE not in self.finished:
            added = plan.added()
            sums = self._writer.copy(plan.reader, plan.copied)
            sums |= self._writer.copy(plan.reader, plan.renamed, named=plan.renamed)
            self._writer.write(added)
            self._writer.sync()
            self._partial.journal(OUTSIDE, {CHECKSUMS: sums | checksums(added)})

    def note(self, name: str, entry: Entry) -> None:
        self._partial.journal(name, entry)

    def store(self, name: str, tensors: Mapping[str, Tensor], entry: Entry) -> None:
        self.settle()
        self._writing = self._behind.submit(self._store, name, dict(tensors), entry)

    def settle(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def refuse_lost(self) -> None:
        if self._writing is not None and self._writing.done():
            self.settle()

    def _store(self, name: str, tensors: dict[str, Tensor], entry: Entry) -> None:
        sums = checksums(tensors)
        self._writer.write(tensors)
        self._writer.sync()
        self._partial.journal(name, entry | {CHECKSUMS: sums})

    def recall(self, name: str) -> dict[str, Tensor]:
        expected = self._sums(name)
        if not expected:
            raise not_ours(self._partial.folder, name)
        return read_checked(self._writer, expected)

    def _sums(self, name: str) -> dict[str, str]:
        """Key → checksum of what the journal notes under a name; a fact has none."""
        sums: Any = self.finished[name].get(CHECKSUMS, {})
        if not isinstance(sums, dict):
            raise not_ours(self._partial.folder, name)
        return cast(dict[str, str], sums)

    def publish(
        self, plan: RunPlan[Any], report: RunReport, measure: Callable[[], None], convert: Convert | None
    ) -> None:
        folder, target = result_folder(plan, self.state), self._partial.folder
        self._writer.finish()
        if not plan.recipe.single_file:
            _write_side_files(plan, report, folder)
        self._check_written(plan, folder)
        if convert is not None:
            convert(folder, target)
            measure()
        if self._own_windows and not plan.recipe.single_file:
            store_own_windows(self.state, target)
        self._partial.publish(SINGLE if plan.recipe.single_file else None)

    def _check_written(self, plan: RunPlan[Any], folder: Path) -> None:
        """Open the finished folder as any reader would and hold what is in it against its checksums."""
        reader = CheckpointReader(folder)
        sums = {key: found for name in self.finished for key, found in self._sums(name).items()}
        check_stored(reader, sums)
        copied = {*plan.copied, *plan.renamed, *plan.added()}  # these had no checksums once
        missing = set(plan.tensors) ^ set(reader.keys()) or plan.tensors.keys() - sums.keys() - copied
        if missing:
            raise CheckpointError(
                f"{folder}: tensors are missing, or more than were planned, {min(missing)} first; "
                "start again with --overwrite"
            )


def result_folder(plan: RunPlan[Any], state: Path) -> Path:
    """Where the checkpoint is written: OUT.partial, or inside its state where the result is made from it."""
    return state / plan.staging if plan.staging else state.parent


def not_ours(folder: Path, name: str) -> RecipeError:
    """What to say where the journal notes what this version does not."""
    return RecipeError(
        f"{folder}: another version of llmsparse began this run, and what it noted of {name} "
        "cannot be held against what is on disk; start again with --overwrite"
    )


def _write_config(plan: RunPlan[Any], folder: Path) -> None:
    file = folder / "config.json"
    try:
        if plan.config is not None:
            plan.config.save_pretrained(folder)
        elif encoding_of(config := read_config(plan.folder)) is not None:
            file.write_text(json.dumps(without_encoding(config), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise disk_error(file, error) from error


def _write_side_files(plan: RunPlan[Any], report: RunReport, folder: Path) -> None:
    notes = {"threads": torch.get_num_threads(), f"{plan.text_key} sha256": plan.windows.fingerprint}
    text = plan.resolved.dump(plan.versions | notes, plan.output)
    write_side_files(folder, recipe=text, report=report.stored(), card=report.card())
