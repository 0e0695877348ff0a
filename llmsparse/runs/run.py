"""A run under way: lock, memory, journal, writer, checks, side files, and the final name. The same for every verb.

    with Run(plan, progress, resume=resume, overwrite=overwrite) as run:
        plan = run.plan                                          # with all its windows
        run.copy_the_rest()
        for block in run.blocks():
            run.block(block.name, Record, lambda: make(block))   # made now and written, or recalled
        return run.publish(report)

What a verb makes of a block is hashed, written and synced by a thread while the next block is worked on; it stands in
the journal once it would survive a power cut. So what is killed can be resumed to the same bytes. Of several processes
the first one writes (`written.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from llmsparse.errors import MachineError
from llmsparse.models.block import Block
from llmsparse.runs.device import full_float32
from llmsparse.runs.memory import PeakMemory
from llmsparse.runs.own_windows import CACHED, Writing, noted, write_own_windows
from llmsparse.runs.plan import RunPlan
from llmsparse.runs.progress import Progress, Silent
from llmsparse.runs.report import RunReport
from llmsparse.runs.written import Convert, Output, Written, WrittenElsewhere, not_ours, result_folder
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.text.mix import own_windows


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
        self.ranks = plan.ranks
        self._survey = survey
        self.progress = progress or Silent()
        self._memory = PeakMemory(plan.device)
        self._stack = ExitStack()
        self._how = {"resume": resume, "overwrite": overwrite}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._output = stack.enter_context(self._open_output())
            stack.enter_context(full_float32())
            stack.enter_context(self._memory)
            stack.enter_context(self.progress)
            self._stack = stack
            self._write_own_windows()
            if self._survey is not None:
                self.plan = self._survey(self)
            with self.ranks.together():
                self._output.begin(self.plan)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _open_output(self) -> Output:
        written: Written | None = None
        with self.ranks.together():
            if self.ranks.first:
                written = Written(self.plan, **self._how)
        finished = self.ranks.broadcast(written.finished if written else {}, 0)
        return written or WrittenElsewhere(self.plan.output, finished)

    @property
    def folder(self) -> Path:
        """Where the checkpoint is written."""
        return result_folder(self.plan, self.state)

    def made_so_far(self) -> CheckpointReader:
        """What is written of the result, to be read by all processes. MachineError on a node that does not see it."""
        with self.ranks.together():
            if not self.folder.is_dir():
                raise MachineError(
                    f"{self.folder}: written by rank 0, not seen here; give an --output that all nodes share"
                )
            return CheckpointReader(self.folder)

    @property
    def state(self) -> Path:
        """Where a verb may keep what it needs to go on."""
        return self._output.state

    def has(self, name: str) -> bool:
        """Whether a block, or a fact, is in the journal."""
        return name in self._output.finished

    def copy_the_rest(self) -> None:
        """Copy what the verb does not make from the source, byte for byte; once, whatever the number of resumes."""
        self.settle()
        with self.ranks.together():
            self._output.copy_the_rest(self.plan)

    def blocks(self, head: bool = False) -> Iterator[Block]:
        """The source's blocks one after the other, announced, and if asked its untied output head as the last; each is
        evicted when the next one is asked for."""
        model = self.plan.model
        self.progress.start(len(model.block_names) + head)
        blocks = self.ranks.each(model.blocks())
        self._stack.callback(blocks.close)  # also where the loop is left by an error
        for block in blocks:
            self.progress.block(block.name)
            yield block
        with self.ranks.together():
            last = model.head() if head else None
        if last is not None:
            self.progress.block(last.name)
            yield last

    def block(self, name: str, kind: type[Kind], make: Callable[[], Made[Kind]]) -> Made[Kind]:
        """A block: made now, and written behind; or read back from an interrupted run, held against its checksums."""
        if self.has(name):
            return self._recall(name, kind)
        with self.ranks.together():
            self._output.refuse_lost()  # a disk that failed ends the run before more is made
        made = make()
        with self.ranks.together():
            self._output.store(name, made.tensors, made.record.to_json())
        return made

    def fact(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Something that was found once and is noted in the journal, so that a resumed run goes on with it."""
        self.settle()
        if not self.has(name):
            found = self.ranks.broadcast(find(), 0)
            with self.ranks.together():
                self._output.note(name, found)
        return self._output.finished[name]

    def settle(self) -> None:
        """Return when all that was made is on disk, and in the journal."""
        with self.ranks.together():
            self._output.settle()

    def publish(self, report: Reported, convert: Convert | None = None) -> Reported:
        """Finish the report, write the side files, check what was made and that all is there, and give the folder its name.

        `convert(folder, target)` makes the result out of what lies in the staging folder, where the plan has one.
        """
        self.settle()
        report.warn()
        report.peak_memory_bytes = max(self.ranks.gather(self._memory.read()))
        self._measure(report)
        with self.ranks.together():
            self._output.publish(self.plan, report, partial(self._measure, report), convert)
        return report

    def _measure(self, report: RunReport) -> None:
        report.seconds = time.perf_counter() - self.plan.started
        report.peak_memory_bytes = max(report.peak_memory_bytes, self._memory.read())

    def _recall(self, name: str, kind: type[Kind]) -> Made[Kind]:
        try:
            record = kind.from_json(self._output.finished[name])
        except (KeyError, TypeError) as error:
            raise not_ours(self.state.parent, name) from error
        return Made(self.ranks.known(lambda: self._output.recall(name)), record)

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
        ids = self.ranks.known(lambda: write_own_windows(plan, unwritten, writing, self.state, steps))
        windows = replace(own_windows(unwritten, ids), protocol=plan.windows.protocol)
        self.plan = replace(plan, windows=windows)
